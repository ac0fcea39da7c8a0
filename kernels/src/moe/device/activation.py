"""Gates and the one matrix product that all kernels share."""

import triton
import triton.language as tl


@triton.jit
def mma(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32. UPCAST is for the interpreter, which stores bf16 as integers and would multiply those."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def gate(g, u, slope, limit, CLAMPED: tl.constexpr):
    """silu(g) * u, or gpt-oss's min(g, limit) * sigmoid(slope * g) * (clamp(u, -limit, limit) + 1). All in fp32."""
    if CLAMPED:
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
        return g * tl.sigmoid(slope * g) * (u + 1.0)
    return g * tl.sigmoid(g) * u


@triton.jit
def gate_backward(g, u, slope, limit, CLAMPED: tl.constexpr):
    """The gate's value and its derivatives by g and u; a clamped input gets none."""
    if CLAMPED:
        inside_g = g <= limit
        inside_u = (u >= -limit) & (u <= limit)
        gc = tl.minimum(g, limit)
        uc = tl.minimum(tl.maximum(u, -limit), limit)
        s = tl.sigmoid(slope * gc)
        value = gc * s * (uc + 1.0)
        by_g = tl.where(inside_g, (s + slope * gc * s * (1.0 - s)) * (uc + 1.0), 0.0)
        by_u = tl.where(inside_u, gc * s, 0.0)
    else:
        s = tl.sigmoid(g)
        value = g * s * u
        by_g = (s + g * s * (1.0 - s)) * u
        by_u = g * s
    return value, by_g, by_u
