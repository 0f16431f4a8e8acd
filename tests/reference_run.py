"""What a run must compute, worked out without the code under test: plain torch, float32, one document at a time.

    python tests/reference_run.py MODEL DATA > tests/references/tiny_opt.json

trains MODEL on DATA/train.json for two epochs of ten steps of eight samples (the last of each epoch takes the
five that are left), and evaluates on DATA/eval.json before, between and after.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED, GLOBAL_BATCH, EPOCHS, RATE, LENGTH = 1234, 8, 2, 1e-3, 64


def read_documents(file: Path, tokenizer) -> list[torch.Tensor]:
    """Token ids of every record, in the published order of a single data set used whole."""
    records = json.loads(file.read_text(encoding="utf-8"))
    order = np.arange(len(records), dtype=np.uint32)
    np.random.RandomState(SEED).shuffle(order)
    texts = [f" {records[row]['prompt']} {records[row]['chosen']}" for row in order]
    return [torch.tensor((tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])[:LENGTH]) for text in texts]


def negative_log_likelihood(model, document: torch.Tensor) -> torch.Tensor:
    """Sum over the document's tokens but the first."""
    logits = model(input_ids=document[None]).logits[0].float()
    log_probabilities = logits[:-1] - torch.logsumexp(logits[:-1], dim=-1, keepdim=True)
    return -log_probabilities.gather(1, document[1:, None]).sum()


def evaluate(model, documents: list[torch.Tensor]) -> float:
    with torch.no_grad():
        total = sum(negative_log_likelihood(model, document).item() for document in documents)
    return total / sum(len(document) - 1 for document in documents)


def reference(model_folder: str, data_folder: str) -> dict[str, list[float]]:
    """Losses of every step, evaluation losses, and the gradient norms before clipping."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()  # eval: no dropout
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    train = read_documents(Path(data_folder) / "train.json", tokenizer)
    held_out = read_documents(Path(data_folder) / "eval.json", tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(train) / GLOBAL_BATCH)
    result = {"losses": [], "eval_losses": [evaluate(model, held_out)], "gradient_norms": []}
    for epoch in range(1, EPOCHS + 1):
        order = np.random.default_rng([SEED, epoch]).permutation(len(train))
        for start in range(0, len(train), GLOBAL_BATCH):
            chosen = [train[row] for row in order[start : start + GLOBAL_BATCH]]
            labels = sum(len(document) - 1 for document in chosen)
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * len(result["losses"]) / steps))
            optimizer.zero_grad()
            loss = 0.0
            for document in chosen:
                part = negative_log_likelihood(model, document) / labels
                part.backward()
                loss += part.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            result["losses"].append(loss)
            result["gradient_norms"].append(norm.item())
        result["eval_losses"].append(evaluate(model, held_out))
    return result


if __name__ == "__main__":
    print(json.dumps(reference(sys.argv[1], sys.argv[2]), indent=1))
