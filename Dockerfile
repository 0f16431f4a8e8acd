# The tested versions on CUDA. Build it in a checkout, and give the run its GPUs and its folders:
#   docker build -t sft .
#   docker run --rm -it --gpus all --ipc host -v /data:/data -v "$PWD/output:/sft/output" sft \
#       deepspeed main.py --model_name_or_path /data/opt-1.3b --data_path /data/chats.jsonl --output_dir output
# "devel" has the compiler that builds DeepSpeed's kernels at the first start. Its CUDA is the one torch 2.13 is built with.
FROM nvidia/cuda:13.0.1-devel-ubuntu22.04

# Python, what compiles kernels (g++, libaio for --offload nvme), and what starts ranks on other nodes (ssh, pdsh).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ git libaio-dev openssh-client pdsh python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv
ENV PATH=$VIRTUAL_ENV/bin:$PATH
WORKDIR /sft
COPY requirements.lock ./
RUN python3.11 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir --require-hashes --requirement requirements.lock

COPY . .
CMD ["python", "main.py", "--help"]
