"""Each op as a model-local function of standard operators: what runs where our library is not registered.

One function per op serves every node: attributes are references, sizes are read from shapes. What depends on
weights and static sizes alone, all the unpacking, is folded when a session is created, so a float matmul remains.
"""

from __future__ import annotations

from onnx import FunctionProto, parser

from specquant.custom_ops.functions_attention import HALF_KV_ATTENTION
from specquant.custom_ops.functions_int4_kv import INT4_KV_ATTENTION
from specquant.custom_ops.schema import DOMAIN, GATES, OPS, PROLOGUES, VERSION

OPSET = 23  # the first with RMSNormalization, which the graph uses

# Columns from rank on are set to 0 rather than cut off, so that shapes stay static when rank is an input.
_SPECTRAL_BRANCH = """
{
    x32 = Cast <to = 1> (x)
    b = Cast <to = 1> (basis)
    c = Cast <to = 1> (coef)
    all = MatMul (x32, b)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    width_1d = Shape <start = 1> (basis)
    width = Squeeze (width_1d)
    column = Range (zero, width, one)
    used = Less (column, rank)
    zero32 = Constant <value_float = 0.0> ()
    low32 = Where (used, all, zero32)
    y32 = MatMul (low32, c)
    y = CastLike (y32, x)
    low = CastLike (low32, x)
}
"""

# x̂ (docs/ops.md).
_PROLOGUE = f"""
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
_FINISH = f"""
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
_ROTATED = """
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

# Unpacking: bytes [P, Q, lane, j] → [Q, j, P, lane] → [Q, j, M] → nibbles [Q, half, j, M] → [G, 8Q/G, M] → [8Q, M].
# A nibble q + 8 with its top bit flipped is q in two's complement, and in the high half of an int8 it is 16 q. All
# that is done on bytes, in two simple transposes: session creation keeps every step in memory until the last.
# N is known only from x, whose shape ONNX Runtime does not fold, so x is padded to the weights' 8Q features; with
# groups, 8 divides N and nothing is missing.
# Quantisation: clip(rint(u · inv) + z, 0, qmax) − z is rint(u · inv) held between −z and qmax − z, and
# a NaN or an infinity needs no care: one of inv, s and the rounded value is NaN or infinite too, and reaches y as NaN.
_INT4_RESIDUAL_MATMUL = """
{
#PROLOGUE
#ROTATED
    u = Identity (x_rotated)
    m = Shape <start = 1> (scales)
    zero = Constant <value_ints = [0]> ()
    minus_one = Constant <value_ints = [-1]> ()

    sign_bits = Constant <value = int8 {-120}> ()
    signed_nibbles = BitwiseXor (qweight, sign_bits)
    bytes = Cast <to = 2> (signed_nibbles)
    lanes_shape = Constant <value_ints = [0, 0, 16, 4]> ()
    by_lane = Reshape (bytes, lanes_shape)
    by_feature = Transpose <perm = [0, 1, 3, 2]> (by_lane)
    features_first = Transpose <perm = [1, 2, 0, 3]> (by_feature)
    joined_shape = Constant <value_ints = [0, 0, -1]> ()
    joined = Reshape (features_first, joined_shape)
    one_1d = Constant <value_ints = [1]> ()
    two_1d = Constant <value_ints = [2]> ()
    cut = Slice (joined, zero, m, two_1d)
    four = Constant <value = uint8 {4}> ()
    high_mask = Constant <value = uint8 {240}> ()
    low_half = BitShift <direction = "LEFT"> (cut, four)
    high_half = BitwiseAnd (cut, high_mask)
    halves = Concat <axis = 1> (low_half, high_half)
    groups = Shape <start = 0, end = 1> (scales)
    grouped_shape = Concat <axis = 0> (groups, minus_one, m)
    grouped = Reshape (halves, grouped_shape)
    signed = Cast <to = 3> (grouped)
    q16 = Cast <to = 1> (signed)
    sixteenth = Constant <value_float = 0.0625> ()
    scales32 = Cast <to = 1> (scales)
    scales_16 = Mul (scales32, sixteenth)
    scale_row = Unsqueeze (scales_16, one_1d)
    scaled = Mul (q16, scale_row)
    weight_shape = Concat <axis = 0> (minus_one, m)
    weight = Reshape (scaled, weight_shape)

    bits = Constant <value_int: int = @act_bits> ()
    clip = Constant <value_float: float = @act_clip> ()
    act_group = Constant <value_int: int = @act_group> ()
    unquantised_bits = Constant <value_int = 16> ()
    is_quantised = Less (bits, unquantised_bits)
    input = If (is_quantised) <
        then_branch = quantise () => (dequantised) {
            tokens = Flatten <axis = -1> (u)
            one_run = Constant <value_ints = [0, 1, -1]> ()
            zero_and_rest = Constant <value_ints = [0, -1]> ()
            act_group_1d = Reshape (act_group, minus_one)
            many_runs = Concat <axis = 0> (zero_and_rest, act_group_1d)
            whole_token = Equal (act_group_1d, zero)
            runs_shape = Where (whole_token, one_run, many_runs)
            runs = Reshape (tokens, runs_shape)
            zero32 = Constant <value_float = 0.0> ()
            one32 = Constant <value_float = 1.0> ()
            two32 = Constant <value_float = 2.0> ()
            levels = Pow (two32, bits)
            eight = Constant <value_int = 8> ()
            is_byte = Equal (bits, eight)
            unused = Where (is_byte, two32, one32)
            qmax = Sub (levels, unused)
            smallest = ReduceMin (runs, minus_one)
            largest = ReduceMax (runs, minus_one)
            least = Min (smallest, zero32)
            most = Max (largest, zero32)
            clipped_least = Mul (least, clip)
            clipped_most = Mul (most, clip)
            size_below = Neg (clipped_least)
            largest_size = Max (size_below, clipped_most)
            minus_size = Neg (largest_size)
            lo = Where (is_byte, minus_size, clipped_least)
            hi = Where (is_byte, largest_size, clipped_most)
            range = Sub (hi, lo)
            tiny = Constant <value_float = 1.0e-30> ()
            is_empty = Less (range, tiny)
            inverse_range = Div (qmax, range)
            inv = Where (is_empty, zero32, inverse_range)
            s = Div (range, qmax)
            scaled_lo = Mul (lo, inv)
            minus_z = Round (scaled_lo)
            top = Add (minus_z, qmax)
            scaled_u = Mul (runs, inv)
            rounded = Round (scaled_u)
            at_most = Min (rounded, top)
            centred = Max (at_most, minus_z)
            scaled_back = Mul (centred, s)
            u_shape = Shape (u)
            dequantised = Reshape (scaled_back, u_shape)
        },
        else_branch = keep () => (kept) { kept = Identity (u) }
    >
    group_size = Constant <value_int: int = @group_size> ()
    any_group = Add (group_size, act_group)
    in_whole_blocks = Cast <to = 9> (any_group)
    padded = If (in_whole_blocks) <
        then_branch = whole () => (same) { same = Identity (input) },
        else_branch = pad () => (longer) {
            n = Shape <start = -1> (u)
            rows = Shape <end = 1> (weight)
            missing = Sub (rows, n)
            pads = Concat <axis = 0> (zero, missing)
            none = Constant <value_float = 0.0> ()
            longer = Pad (input, pads, none, minus_one)
        }
    >
    product = MatMul (padded, weight)
    v = Add (product, bias)
#FINISH
}
"""

_SPECQUANT_MATMUL = """
{
#PROLOGUE
#ROTATED
    x32 = Identity (x_rotated)
    branch, low = specquant.SpectralBranch (x32, basis, coef, rank)
    subtract = Constant <value_int: int = @subtract> ()
    is_subtracted = Cast <to = 9> (subtract)
    u = If (is_subtracted) <
        then_branch = remove () => (rest) {
            b = Cast <to = 1> (basis)
            b_t = Transpose <perm = [1, 0]> (b)
            part = MatMul (low, b_t)
            rest = Sub (x32, part)
        },
        else_branch = keep () => (kept) { kept = Identity (x32) }
    >
    absent = Constant <value_floats = [0.0]> ()
    product = specquant.Int4ResidualMatMul
        <group_size: int = @group_size, act_bits: int = @act_bits, act_group: int = @act_group,
         act_clip: float = @act_clip>
        (u, qweight, scales, bias, absent, absent)
    v = Add (branch, product)
#FINISH
}
"""

_BODIES = {
    "SpectralBranch": _SPECTRAL_BRANCH,
    "Int4ResidualMatMul": _INT4_RESIDUAL_MATMUL,
    "SpecQuantMatMul": _SPECQUANT_MATMUL,
    "Int4KVAttention": INT4_KV_ATTENTION,
    "HalfKVAttention": HALF_KV_ATTENTION,
}
_CALLS = {"SpecQuantMatMul": {"SpectralBranch", "Int4ResidualMatMul"}}  # other ops that a body calls


def function_protos(names: set[str]) -> list[FunctionProto]:
    """The functions of the ops in `names` and of those they call, in the order of schema.OPS."""
    needed = names.union(*(_CALLS.get(name, set()) for name in names))
    return [_function(name) for name in OPS if name in needed]


def _function(name: str) -> FunctionProto:
    op = OPS[name]
    attributes = ", ".join(f"{a.name}: {type(a.default).__name__} = {a.default}" for a in op.attributes)
    inputs, outputs = (", ".join(tensor.name for tensor in tensors) for tensors in (op.inputs, op.outputs))
    header = f'<opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}], domain: "{DOMAIN}">'
    signature = f"{name} {f'<{attributes}>' if attributes else ''} ({inputs}) => ({outputs})"
    body = _BODIES[name]
    for part, text in (("#PROLOGUE", _PROLOGUE), ("#ROTATED", _ROTATED), ("#FINISH", _FINISH)):
        body = body.replace(part, text)
    function: FunctionProto = parser.parse_function(f"{header}\n{signature}\n{body}")
    function.doc_string = op.doc
    return function
