"""What surrounds the product in a function of functions.py: the norm before it, the rotation, gate and residual."""

from __future__ import annotations

from specquant.custom_ops.schema import GATES, PROLOGUES

# x̂ (docs/ops.md).
PROLOGUE = f"""
    x_float = Cast <to = 1> (x)
    prologue = Constant <value_int: int = @prologue> ()
    of_norm = Constant <value_int = {PROLOGUES.index("rms_norm")}> ()
    is_norm = Equal (prologue, of_norm)
    x_hat = If (is_norm) <
        then_branch = norm_x () => (normed) {{
            normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (x_float, norm)
        }},
        else_branch = no_norm () => (not_normed) {{ not_normed = Identity (x_float) }}
    >
"""

# From v to y: pairs of outputs by a gate, the residual. Shapes are inferred of branches that are not taken, too: hence
# whole pairs, whatever v is.
FINISH = f"""
    gate = Constant <value_int: int = @gate> ()
    is_gated = Cast <to = 9> (gate)
    y_gated = If (is_gated) <
        then_branch = gate_v () => (product_of_pairs) {{
            g_axis = Constant <value_ints = [-1]> ()
            g_first = Constant <value_ints = [0]> ()
            g_second = Constant <value_ints = [1]> ()
            g_step = Constant <value_ints = [2]> ()
            g_width = Shape <start = -1> (v)
            g_pairs = Div (g_width, g_step)
            g_end = Mul (g_pairs, g_step)
            g = Slice (v, g_first, g_end, g_axis, g_step)
            up = Slice (v, g_second, g_end, g_axis, g_step)
            of_gelu = Constant <value_int = {GATES.index("gelu")}> ()
            is_gelu = Equal (gate, of_gelu)
            active = If (is_gelu) <
                then_branch = by_gelu () => (g_gelu) {{ g_gelu = Gelu <approximate = "tanh"> (g) }},
                else_branch = by_silu () => (g_silu) {{
                    g_sigmoid = Sigmoid (g)
                    g_silu = Mul (g, g_sigmoid)
                }}
            >
            product_of_pairs = Mul (active, up)
        }},
        else_branch = no_gate () => (not_gated) {{ not_gated = Identity (v) }}
    >
    residual32 = Cast <to = 1> (residual)
    y32 = Add (y_gated, residual32)
    y = CastLike (y32, x)
"""

# x̂ H: a product with the Hadamard matrix, which is made of its definition, H[i, j] = (−1)^popcount(i & j) / √block, and
# folded when a session is created. Shapes are inferred of the branch that is not taken, too: hence at least 1.
ROTATED = """
    block = Constant <value_int: int = @hadamard> ()
    is_rotated = Cast <to = 9> (block)
    x_rotated = If (is_rotated) <
        then_branch = rotate () => (turned) {
            h_zero = Constant <value_int = 0> ()
            h_one = Constant <value_int = 1> ()
            h_block = Max (block, h_one)
            h_index = Range (h_zero, h_block, h_one)
            h_bits = Cast <to = 12> (h_index)
            h_axis = Constant <value_ints = [1]> ()
            h_column = Unsqueeze (h_bits, h_axis)
            h_common = BitwiseAnd (h_bits, h_column)
            h_8 = Constant <value = uint32 {8}> ()
            h_4 = Constant <value = uint32 {4}> ()
            h_2 = Constant <value = uint32 {2}> ()
            h_1 = Constant <value = uint32 {1}> ()
            h_by_8 = BitShift <direction = "RIGHT"> (h_common, h_8)
            h_fold_8 = BitwiseXor (h_common, h_by_8)
            h_by_4 = BitShift <direction = "RIGHT"> (h_fold_8, h_4)
            h_fold_4 = BitwiseXor (h_fold_8, h_by_4)
            h_by_2 = BitShift <direction = "RIGHT"> (h_fold_4, h_2)
            h_fold_2 = BitwiseXor (h_fold_4, h_by_2)
            h_by_1 = BitShift <direction = "RIGHT"> (h_fold_2, h_1)
            h_fold_1 = BitwiseXor (h_fold_2, h_by_1)
            h_parity = BitwiseAnd (h_fold_1, h_1)
            h_odd = Cast <to = 9> (h_parity)
            h_size = Cast <to = 1> (h_block)
            h_root = Sqrt (h_size)
            h_plus = Reciprocal (h_root)
            h_minus = Neg (h_plus)
            h_matrix = Where (h_odd, h_minus, h_plus)
            h_tokens = Flatten <axis = -1> (x_hat)
            h_rest = Constant <value_ints = [0, -1]> ()
            h_first = Constant <value_ints = [0]> ()
            h_last = Unsqueeze (h_block, h_first)
            h_shape = Concat <axis = 0> (h_rest, h_last)
            h_blocks = Reshape (h_tokens, h_shape)
            h_product = MatMul (h_blocks, h_matrix)
            h_x_shape = Shape (x_hat)
            turned = Reshape (h_product, h_x_shape)
        },
        else_branch = leave () => (left) { left = Identity (x_hat) }
    >
"""
