"""Training steps whose live memory is measured."""

from optimzoo.memory import language_model_step


def training_step(model, optimizer, batch, seq):
    """Return a function that takes one step on random tokens, and frees its gradients."""
    loss_of = language_model_step(batch, seq)

    def step():
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
