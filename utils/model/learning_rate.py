"""Says where a learning rate is far from what a model of this size is usually trained with."""

from utils.distributed.ranks import print_rank_0

# For full training: from so many trained weights on, the rate that is too high, and the usual one.
USUAL_RATES = ((1e9, 1e-4, 1e-5), (1e8, 1e-3, 5e-5))
TOO_LOW = 100  # times less than the usual rate
LORA_RATES = (1e-2, 5e-4)


def advise_rate(trained: int, rate: float, lora_rate: float, lora_dim: int) -> None:
    """Print one line if the rate of all weights, or with LoRA that of its weights, is far from the usual one.

    Args:
        trained: number of weights that train.
    """
    if lora_dim > 0:
        high, usual = LORA_RATES
        if lora_rate >= high:
            print_rank_0(f"Learning rate: --lora_learning_rate {lora_rate:g} is high: {usual:g} is usual for LoRA")
        return
    if line := rate_advice(trained, rate):
        print_rank_0(line)


def rate_advice(trained: int, rate: float) -> str | None:
    """Return a line on the rate for full training of so many weights; None where it is not far from the usual one."""
    for least, high, usual in USUAL_RATES:
        if trained >= least:
            if 0 < rate <= usual / TOO_LOW or rate >= high:
                word = "high" if rate >= high else "low"
                return (
                    f"Learning rate: {rate:g} is {word} for full training of {trained / 1e9:.2g} billion weights: "
                    f"{usual:g} is usual (--learning_rate {usual:g})"
                )
            return None
    return None
