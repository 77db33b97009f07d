"""Are the gradients of PyTorch's cuDNN attention right, whatever the memory layout of the output's gradient?"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def laid_out(x, layout):
    if layout == "expanded":  # one number, as .sum() sends it back
        return x[:1, :1, :1, :1].expand(x.shape)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "transposed" else x.contiguous()


def public(inputs, gradient, backend=SDPBackend.CUDNN_ATTENTION):
    with sdpa_kernel(backend):
        return torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, gradient)


def operator(inputs, gradient):
    output, lse, *lengths, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(*inputs, None, True)
    state = (output, lse, seed, offset, None, *lengths, 0.0, False)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(gradient, *inputs, *state)


print("PyTorch", torch.__version__, "cuDNN", torch.backends.cudnn.version(), torch.cuda.get_device_name())
layouts, length = ("contiguous", "transposed", "expanded"), 64
for route, layout, order in itertools.product((public, operator), layouts[:2], itertools.permutations(layouts)):
    length += 8  # a shape of its own for each order: PyTorch keeps the graphs that cuDNN has built, by shape
    torch.manual_seed(0)
    query, key, value, upstream = (torch.randn(2, 4, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    inputs = [laid_out(x, layout).requires_grad_() for x in (query, key, value)]
    for step, name in enumerate((*order, order[0]), 1):
        gradient = laid_out(upstream, name)
        exact = public([x.detach().double().requires_grad_() for x in inputs], gradient.double(), SDPBackend.MATH)
        pairs = zip(route([*inputs], gradient), exact, strict=True)
        errors = [((ours - right).abs().max() / right.abs().max()).item() for ours, right in pairs]
        case = f"{route.__name__}: inputs {layout}, L = {length}, gradient {step}, {name} {gradient.stride()}"
        print("wrong" if max(errors) > 0.05 else "right", case, *(f"{x:.1e}" for x in errors), flush=True)
