from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pretrain.model.kernels.experts_loop import looped_mixture
from pretrain.model.kernels.needed import as_inner_nodes, is_needed
from pretrain.model.kernels.short_convolution import short_convolution
from pretrain.model.kernels.slots import sort_by_expert


class Product(torch.autograd.Function):
    asked: list[tuple[bool, bool]]

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        Product.asked.append((is_needed(ctx, 0), is_needed(ctx, 1)))
        x, weight = ctx.saved_tensors
        return grad[0] * weight, grad[0] * x


def test_a_backward_knows_what_is_asked_of_it() -> None:
    x, weight = (torch.ones(3, requires_grad=True) for _ in range(2))
    out = Product.apply(*as_inner_nodes(x, weight))
    Product.asked = []
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    edge = GradientEdge(out.grad_fn, 0)
    torch.autograd.grad(edge, weight, torch.ones(3), retain_graph=True)
    out.sum().backward()
    Product.apply(*as_inner_nodes(x, weight.detach())).sum().backward()
    assert Product.asked == [(True, False), (False, True), (True, True), (True, False)]


def halves_agree_with_the_whole(out: Tensor, inputs: list[Tensor], weights: list[Tensor]) -> None:
    grad = torch.randn(out.shape)
    whole = torch.autograd.grad(out, [*inputs, *weights], grad, retain_graph=True)
    by_inputs = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    by_weights = torch.autograd.grad(out, weights, grad)
    for half, expected in zip([*by_inputs, *by_weights], whole, strict=True):
        assert torch.equal(half, expected)


def test_the_halves_of_a_mixture_of_experts() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 8, requires_grad=True)
    expert_weights = torch.rand(9, 2, requires_grad=True)
    gate_up, down = (torch.randn(4, *shape, requires_grad=True) for shape in ((12, 8), (8, 6)))
    slots = sort_by_expert(torch.rand(9, 4).topk(2).indices, 4, 18)
    out = looped_mixture(x, expert_weights, slots, gate_up, down)
    halves_agree_with_the_whole(out, [x, expert_weights], [gate_up, down])


def test_the_halves_of_a_convolution() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 200, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    halves_agree_with_the_whole(short_convolution(x, weight), [x], [weight])
