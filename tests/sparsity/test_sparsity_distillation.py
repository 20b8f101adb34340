"""The distillation loss against the formula written out, its gradient, and what it holds."""

import pytest
import torch
from torch.nn import functional as F

from optimzoo.sparsity import distillation_loss, linear_distillation_loss


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tokens(*shape, vocab, seed=0, ignored=()):
    labels = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
    labels.view(-1)[list(ignored)] = -100
    return labels


def naive(student, teacher, labels, eta):
    student, teacher, labels = student.flatten(0, -2), teacher.flatten(0, -2), labels.flatten()
    kept = labels != -100
    student, teacher, labels = student[kept], teacher[kept], labels[kept]
    target = teacher.log_softmax(-1)
    divergence = F.kl_div(student.log_softmax(-1), target, reduction="batchmean", log_target=True)
    return eta * divergence + (1 - eta) * F.cross_entropy(student, labels)


CASES = [((1,), 2), ((7,), 129), ((2, 5), 11), ((3, 1, 4), 7)]


@pytest.mark.parametrize("eta", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize(("shape", "vocab"), CASES)
def test_is_the_formula_and_its_gradient(shape, vocab, chunk, eta):
    student = (3 * draw(*shape, vocab)).requires_grad_()
    teacher = 3 * draw(*shape, vocab, seed=1)
    ignored = [0, 4] if len(shape) > 1 else []
    labels = tokens(*shape, vocab=vocab, ignored=ignored)
    expected = naive(student, teacher, labels, eta)
    (slope,) = torch.autograd.grad(5 * expected, student)
    loss = distillation_loss(student, teacher, labels, eta, chunk=chunk)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    (grad,) = torch.autograd.grad(5 * loss, student)
    torch.testing.assert_close(grad, slope, rtol=1e-11, atol=1e-13)


def test_gradcheck():
    student, teacher = draw(4, 6).requires_grad_(), draw(4, 6, seed=1)
    labels = tokens(4, vocab=6, ignored=[2])
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, teacher, labels, 0.4, chunk=3), (student,)
    )


@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_from_hidden_states_without_whole_logits(chunk):
    hidden, head = draw(2, 5, 3).requires_grad_(), draw(11, 3, seed=1).requires_grad_()
    other, other_head = draw(2, 5, 7, seed=2), draw(11, 7, seed=3)  # a wider teacher
    labels = tokens(2, 5, vocab=11, ignored=[6])
    expected = naive(hidden @ head.mT, other @ other_head.mT, labels, 0.4)
    slopes = torch.autograd.grad(expected, (hidden, head))
    loss = linear_distillation_loss((hidden, head), (other, other_head), labels, 0.4, chunk=chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    grads = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(grads, slopes, rtol=1e-11, atol=1e-13)


def test_a_student_that_is_the_teacher_has_no_divergence():
    logits = draw(6, 9).requires_grad_()
    loss = distillation_loss(logits, logits.detach(), tokens(6, vocab=9), 1.0)
    assert abs(loss.item()) < 1e-12
    loss.backward()
    assert logits.grad.abs().max() < 1e-12


def test_bfloat16_logits_are_computed_in_float32():
    student = draw(8, 33, dtype=torch.bfloat16).requires_grad_()
    teacher, labels = draw(8, 33, seed=1, dtype=torch.bfloat16), tokens(8, vocab=33)
    loss = distillation_loss(student, teacher, labels)
    expected = naive(student.double(), teacher.double(), labels, 1 / 3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, student)
    (slope,) = torch.autograd.grad(expected, student)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), slope.double(), rtol=8e-3, atol=1e-6)


def test_a_teacher_that_rules_a_token_out():
    teacher = draw(3, 5, seed=1)
    teacher[:, 2] = -torch.inf
    student = draw(3, 5).requires_grad_()
    loss = distillation_loss(student, teacher, torch.tensor([0, 1, 3]), 0.5)
    kept = torch.tensor([0, 1, 3, 4])
    q, log_p = teacher.softmax(-1), student.log_softmax(-1)
    divergence = (q[:, kept] * (q[:, kept].log() - log_p[:, kept])).sum(-1).mean()
    likelihood = F.nll_loss(log_p, torch.tensor([0, 1, 3]))
    assert loss.item() == pytest.approx((0.5 * (divergence + likelihood)).item())
    loss.backward()
    assert student.grad.isfinite().all()


def test_without_labels_the_loss_and_its_gradient_are_zero():
    student = draw(3, 5).requires_grad_()
    loss = distillation_loss(student, draw(3, 5, seed=1), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert (student.grad == 0).all()


def test_holds_one_gradient_and_no_whole_softmax():
    """What autograd keeps for the backward, and the largest tensor made on the way."""
    rows, vocab, chunk = 512, 64, 16
    student = draw(rows, vocab, dtype=torch.bfloat16).requires_grad_()
    teacher = draw(rows, vocab, seed=1, dtype=torch.bfloat16)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                made.append(out.numel())
            return out

    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with Watch(), hooks:
        loss = distillation_loss(student, teacher, tokens(rows, vocab=vocab), chunk=chunk)
    loss.backward()
    assert max(made) == chunk * vocab
    assert [(t.numel(), t.dtype) for t in saved] == [(rows * vocab, torch.bfloat16)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": 1.5}, r"Invalid eta: 1.5; it must be in \[0, 1\]"),
        ({"eta": float("nan")}, "Invalid eta: nan"),
        ({"chunk": 0}, "Invalid chunk: 0; it must be at least 1"),
        ({"teacher_logits": torch.zeros(4, 6)}, r"student \[4, 5\], teacher \[4, 6\]"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \[3\] do not fit"),
        ({"labels": torch.full((4,), 5)}, r"labels go from 5 to 5; they must be in \[0, 5\)"),
        ({"labels": torch.full((4,), -1)}, "labels go from -1"),
    ],
)
def test_refuses_in_one_line(change, message):
    good = {"student_logits": torch.zeros(4, 5), "teacher_logits": torch.zeros(4, 5)}
    good["labels"] = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=message) as caught:
        distillation_loss(**{**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [1.0, 2.0**12, 2.0**16])
def test_a_loss_scale_in_float16(scale):
    """Gradients in float16 of a scaled loss, against those of the formula in float64."""
    hidden, head = draw(64, 8), 0.2 * draw(33, 8, seed=1)
    other, labels = draw(64, 33, seed=2), tokens(64, vocab=33)
    exact = [t.half().double().requires_grad_() for t in (hidden, head)]
    logits = (exact[0] @ exact[1].mT).detach().half().double().requires_grad_()
    half = [t.detach().half().requires_grad_() for t in (*exact, logits)]
    teacher = (torch.eye(8, dtype=torch.float16).repeat(8, 1), 0.2 * draw(33, 8, seed=3).half())
    naive(logits, other.half().double(), labels, 0.4).backward()
    rule = {"rtol": 0.02, "atol": 2e-6}
    (distillation_loss(half[2], other.half(), labels, 0.4, chunk=7) * scale).backward()
    torch.testing.assert_close(half[2].grad.double() / scale, logits.grad, **rule)
    naive(exact[0] @ exact[1].mT, (teacher[0] @ teacher[1].mT).double(), labels, 0.4).backward()
    student = (half[0], half[1])
    (linear_distillation_loss(student, teacher, labels, 0.4, chunk=7) * scale).backward()
    for own, wanted in zip(student, exact, strict=True):
        torch.testing.assert_close(own.grad.double() / scale, wanted.grad, rtol=0.05, atol=2e-4)
