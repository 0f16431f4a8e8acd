"""A GPU of shapes alone: tensors on the device "cuda" without data, for machines without a GPU.

torch's `FakeTensorMode` carries out every operation as far as its answer's shape, dtype and device, and raises an error
where tensors on two devices meet or where a value of the device would decide what happens next: on a GPU, a wait.
"""

import ctypes
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# Autograd asks the device's guard for streams, and torch's hooks whether there is a device. A torch built without CUDA
# has no guard, and one built with it asks a driver; both are replaced, the hooks' object by its table of functions.
SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
namespace {
using c10::Device, c10::DeviceIndex, c10::Stream;
struct Guard final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(c10::kCUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device) const override { return getStream(getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
struct Hooks final : public at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  long versionCuDNNFrontend() const override { return 0; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
}  // namespace
extern "C" void install() {
  static Guard guard;
  static Hooks hooks;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
  auto* installed = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(installed), static_cast<const void*>(&hooks), sizeof(void*));
}
"""


def compile_fake_device(folder: Path) -> Path:
    """Compile the device's C++ part, some seconds; return the library for `on_fake_gpu`."""
    torch_folder, library = Path(torch.__file__).parent, folder / "fake_gpu.so"
    (folder / "fake_gpu.cpp").write_text(SOURCE)
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(folder / "fake_gpu.cpp"),
         f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)],
        check=True,
    )  # fmt: skip
    return library


class Operations(TorchDispatchMode):
    """Counts the operations by name; copies between devices are named `copy_to_cpu` and `copy_to_cuda`."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != result.device.type:
                name = f"copy_to_{result.device.type}"
        self.count[name] += 1
        return result


_library = torch.library.Library("aten", "IMPL")


def _efficient_backward_shapes(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, ...]:
    """Return tensors like this operator's gradients: torch's own function for it (2.11 to 2.13) lacks an argument."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), query.new_empty(())


@contextmanager
def on_fake_gpu(library: Path) -> Iterator[FakeTensorMode]:
    """Make tensors of shapes alone in this block, also on "cuda"; for a process of its own, which it changes for good.

    library: of `compile_fake_device`; not used where there is a GPU.
    """
    _library.impl("_efficient_attention_backward", _efficient_backward_shapes, "Meta", allow_override=True)
    if not torch.cuda.is_available():
        ctypes.CDLL(str(library)).install()
    with FakeTensorMode() as mode:
        yield mode


def move_to_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """Move the parameters and buffers of a model to "cuda", as `model.to` does, which can't move tensors of shapes."""
    moved: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in moved:
                moved[id(weight)] = torch.nn.Parameter(weight.detach().to("cuda"), weight.requires_grad)
            module._parameters[name] = None if weight is None else moved[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("cuda")
    return model
