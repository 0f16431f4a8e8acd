"""Contrastive and diverse beam search as the papers put them: slow, one prompt at a time, no cache, plain lists.

Written from Su et al. 2022 (equation 5) and Vijayakumar et al. 2016 (algorithm 1), not from the code under test:
tests compare the two token for token.
"""

import torch


@torch.no_grad()
def look(model, ids):
    """(log-probabilities of the next token [vocabulary], last-layer hidden states [tokens, width]) of a text."""
    out = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return out.logits[0, -1].log_softmax(-1), out.hidden_states[-1][0]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def contrastive(model, prompt, top_k, alpha, steps, ends, banned=()):
    """The answer's ids: each token is the best compromise of likely and unlike what stands before it."""
    ids = list(prompt)
    for _ in range(steps):
        log_probs, hidden = look(model, ids)
        allowed = [token for token in range(len(log_probs)) if token not in banned]
        total = sum(float(log_probs[token].exp()) for token in allowed)
        candidates = sorted(allowed, key=lambda token: -float(log_probs[token]))[:top_k]

        def value(token, hidden=hidden, log_probs=log_probs, total=total):
            own = look(model, [*ids, token])[1][-1]
            likeness = max(cosine(own, past) for past in hidden)
            return (1 - alpha) * float(log_probs[token].exp()) / total - alpha * likeness

        ids.append(max(candidates, key=value))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def diverse_beams(model, prompt, beams, groups, penalty, steps, ends, answers=1, length_penalty=1.0):
    """The ids of the best `answers`: groups of beams move one after another and avoid each other's tokens."""
    width = beams // groups
    running = [[(0.0, [])] for _ in range(groups)]  # (summed penalised score, answer so far)
    ended = [[] for _ in range(groups)]  # (score / length ** length_penalty, answer)
    done = [False] * groups
    for step in range(1, steps + 1):
        taken = []  # tokens of earlier groups' running beams at this step
        for group in range(groups):
            if done[group]:
                continue
            options = []
            for score, answer in running[group]:
                log_probs = look(model, [*prompt, *answer])[0]
                for token in range(len(log_probs)):
                    options.append((score + float(log_probs[token]) - penalty * taken.count(token), [*answer, token]))
            options = sorted(options, key=lambda option: -option[0])[: (1 + max(1, len(ends))) * width]
            stops = [answer[-1] in ends or step == steps for _, answer in options]
            for (score, answer), stop in list(zip(options, stops, strict=True))[:width]:
                if stop:
                    ended[group].append((score / step**length_penalty, answer))
            ended[group] = sorted(ended[group], key=lambda one: -one[0])[:width]
            running[group] = [option for option, stop in zip(options, stops, strict=True) if not stop][:width]
            full = len(ended[group]) == width
            if not running[group] or (full and running[group][0][0] / step**length_penalty <= ended[group][-1][0]):
                done[group] = True
            else:
                taken += [answer[-1] for _, answer in running[group]]
    everything = sorted((one for group in ended for one in group), key=lambda one: -one[0])
    return [answer for _, answer in everything[:answers]]
