"""Mistakes that an inner loop refuses, and its messages."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_plugins.meta import GAP, Identity, InnerLoop, MetaSGD, Vectorization


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.used(x)


class Forgetful(Identity):
    def forward(self, gradients, step):
        return dict(list(gradients.items())[1:])


class Flattened(Identity):
    def forward(self, gradients, step):
        return {name: gradient.flatten() for name, gradient in gradients.items()}


def loop(model=None, loss=F.mse_loss, *arguments, **settings):
    return InnerLoop(model or nn.Linear(2, 1), loss, *arguments, **settings)


def twice(preconditioner):
    loop(None, F.mse_loss, preconditioner)
    loop(None, F.mse_loss, preconditioner)


X, Y = torch.ones(3, 4, 2), torch.ones(3, 4, 1)
PAIR = (X, Y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: InnerLoop("net", F.mse_loss), TypeError, "`model` must be a torch module, got str"),
        (lambda: loop(loss=None), TypeError, "`loss` must be a function of outputs and targets, got NoneType"),
        (lambda: loop(steps=0), ValueError, "`steps` must be at least 1, got 0"),
        (lambda: loop(steps=2.0), TypeError, "`steps` must be an int.*did you mean 2"),
        (lambda: loop(learning_rate="0.1"), TypeError, "`learning_rate` must be a number"),
        (lambda: Vectorization(chunk_size=0), ValueError, "`chunk_size` must be at least 1"),
        (lambda: loop(rates="lerned"), ValueError, "`rates`.*did you mean 'learned'"),
        (lambda: Vectorization(randomness="some"), ValueError, "`randomness` must be 'different' or 'same'.*'same'"),
        (lambda: loop(nn.Sequential(nn.Linear(2, 1)), layers="hed"), ValueError, "no module is called 'hed'"),
        (lambda: loop(nn.Sequential(nn.Linear(2, 1), nn.ReLU()), layers="1"), ValueError, "`layers`: '1' must have"),
        (lambda: loop(nn.ReLU()), ValueError, "`model` must have parameters that require a gradient"),
        (lambda: loop(None, F.mse_loss, GAP), TypeError, r"got GAP; did you mean `GAP\(\)`"),
        (lambda: loop(None, F.mse_loss, nn.Identity()), TypeError, "must be a `Preconditioner`, got Identity"),
        (lambda: twice(MetaSGD()), ValueError, "`preconditioner` must be new, got a MetaSGD that belongs to another"),
        (lambda: loop(None, F.mse_loss, GAP()), ValueError, "`linear=True`"),
        (lambda: loop()((X[0], Y[0]), PAIR), ValueError, r"`support`.*\(tasks, samples, ...\).*unsqueeze"),
        (lambda: loop()(PAIR, (X, Y[..., 0, 0])), ValueError, r"`query`.*got \(3, 4, 2\) and \(3,\)"),
        (lambda: loop()((X, Y[:, :2]), PAIR), ValueError, "equal in these two dimensions"),
        (lambda: loop()((X[:0], Y[:0]), PAIR), ValueError, "at least one of each"),
        (lambda: loop()(PAIR, (X[:2], Y[:2])), ValueError, "`query` must have as many tasks as `support`, 3, got 2"),
        (lambda: loop()(X, PAIR), TypeError, r"`support` must be a pair \(inputs, targets\) of tensors.*got Tensor"),
        (lambda: loop()((X, Y, Y), PAIR), TypeError, "got 3 things"),
        (lambda: loop()(PAIR, PAIR, steps=-1), ValueError, "`steps` must be at least 0"),
        (lambda: loop()(PAIR, PAIR, step_weights=[1.0]), ValueError, "one number per step, 5, got 1"),
        (lambda: loop()(PAIR, PAIR, step_weights=[0.0] * 5), ValueError, "`step_weights` must not all be zero"),
        (lambda: loop()(PAIR, PAIR, steps=1, step_weights=["1"]), TypeError, "`step_weights` must be a number"),
        (lambda: loop(loss=nn.MSELoss(reduction="none"))(PAIR, PAIR), ValueError, r"scalar.*shape \(4, 1\)"),
        (lambda: loop(loss=lambda x, y: 1.0)(PAIR, PAIR), TypeError, "`loss` must return a scalar tensor, got float"),
        (lambda: loop(nn.LSTM(2, 1))(PAIR, PAIR), TypeError, "`model` must return a tensor, got tuple"),
        (lambda: loop(Unused())(PAIR, PAIR), ValueError, "does not on 'unused.weight', 'unused.bias'; name the layers"),
        (lambda: loop(loss=lambda x, y: y.sum())(PAIR, PAIR), ValueError, "it does not on 'weight', 'bias'"),
        (lambda: loop(None, F.mse_loss, Forgetful())(PAIR, PAIR), ValueError, "an update for 'weight', got 'bias'"),
        (lambda: loop(None, F.mse_loss, Flattened())(PAIR, PAIR), ValueError, r"of shape \(1, 2\) for 'weight'"),
        (lambda: loop().predict({}, X), ValueError, "`adapted` must be what `adapt` returned, got no 'weight', 'bias'"),
        (lambda: loop().predict(loop().adapt(PAIR), X[:2]), ValueError, "`inputs` must have the 3 tasks of `adapted`"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
