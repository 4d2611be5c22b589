"""Fine-tuning a causal language model: a tiny Llama on blocks of text.

The script is as usual, but for the three lines marked `unbatch`. They show

- where the model, which computes its own loss, was split into predictions and loss: at the logits,
  `[8, 32, words]`;
- that all structures hold: each block of text is treated on its own, by the same function, so
  statistics over samples mean what their names say;
- the gradient noise scale, in blocks of text: with batches much smaller than that, a step mostly
  follows noise; with much larger ones, the extra cost gains little. It is a rough estimate, from a
  single batch.
"""

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

import unbatch as ub  # unbatch

BLOCK_SIZE = 32


def corpus(sentences):
    """Text with some grammar in it, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        ["the", "a", "every", "no"],
        ["old", "small", "quiet", "green", "happy"],
        ["river", "teacher", "engine", "garden", "letter", "cloud"],
        ["sees", "follows", "remembers", "carries"],
        ["slowly .", "again .", "today .", "without a sound ."],
    ]
    words = []
    for _ in range(sentences):
        words += [w for part in parts for w in part[torch.randint(len(part), (), generator=generator)].split()]
    return words


def tokenize(words):
    vocabulary = {word: i for i, word in enumerate(sorted(set(words)))}
    return [vocabulary[word] for word in words], len(vocabulary)


def group_texts(ids):
    """All text in one row, cut into blocks of the same length: nothing is padded."""
    total = len(ids) // BLOCK_SIZE * BLOCK_SIZE
    blocks = [torch.tensor(ids[i : i + BLOCK_SIZE]) for i in range(0, total, BLOCK_SIZE)]
    return [{"input_ids": block, "labels": block.clone()} for block in blocks]


def main():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    ids, vocabulary = tokenize(corpus(500))
    train_dataloader = DataLoader(group_texts(ids), batch_size=8, shuffle=True, drop_last=True)

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=BLOCK_SIZE, tie_word_embeddings=True, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    num_epochs = 2
    steps = num_epochs * len(train_dataloader)
    lr_scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=steps)

    model.train()
    for epoch in range(num_epochs):
        total_loss = 0.0
        for batch in train_dataloader:
            outputs = model(**batch)
            loss = outputs.loss
            total_loss += loss.item()
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: train loss {total_loss / len(train_dataloader):.3f}")

    problem = ub.Problem(model, batch=batch)  # unbatch
    print(problem.structure, f"gradient noise scale {problem.compute(ub.NoiseScale()):.0f}", sep="\n\n")  # unbatch


if __name__ == "__main__":
    main()
