"""Each op as a model-local function of standard operators: what runs where our library is not registered.

One function per op serves every node: attributes are references, sizes are read from shapes. What depends on
weights and static sizes alone, all the unpacking, is folded when a session is created, so a float matmul remains.
"""

from __future__ import annotations

from onnx import FunctionProto, parser

from specquant.custom_ops.functions_around import FINISH, PROLOGUE, ROTATED
from specquant.custom_ops.functions_attention import HALF_KV_ATTENTION
from specquant.custom_ops.functions_int4_kv import INT4_KV_ATTENTION
from specquant.custom_ops.schema import DOMAIN, OPS, VERSION

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

# Unpacking: bytes [P, Q, lane, j] → [Q, j, P, lane] → [Q, j, M] → nibbles [Q, half, j, M] → [G, 8Q/G, M] → [8Q, M].
# A nibble q + 8 with its top bit flipped is q in two's complement, and in the high half of an int8 it is 16 q. All
# that is done on bytes, in two simple transposes: session creation keeps every step in memory until the last.
# Scales of groups: bytes [P, G, word, byte] → [G, P, byte, word] → nibbles [G, P, byte, half, word] → [G, M].
# N is known only from x, whose shape ONNX Runtime does not fold, so x is padded to the weights' 8Q features; with
# groups, 8 divides N and nothing is missing.
# Quantisation: clip(rint(u · inv) + z, 0, qmax) − z is rint(u · inv) held between −z and qmax − z, and
# a NaN or an infinity needs no care: one of inv, s and the rounded value is NaN or infinite too, and reaches y as NaN.
_INT4_RESIDUAL_MATMUL = """
{
#PROLOGUE
#ROTATED
    u = Identity (x_rotated)
    m = Shape (scales)
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
    groups = Shape <start = 1, end = 2> (group_scales)
    grouped_shape = Concat <axis = 0> (groups, minus_one, m)
    grouped = Reshape (halves, grouped_shape)
    signed = Cast <to = 3> (grouped)
    q16 = Cast <to = 1> (signed)

    words_shape = Constant <value_ints = [0, 0, 2, 4]> ()
    group_bytes = Cast <to = 2> (group_scales)
    by_word = Reshape (group_bytes, words_shape)
    by_byte = Transpose <perm = [1, 0, 3, 2]> (by_word)
    low_mask = Constant <value = uint8 {15}> ()
    low_nibbles = BitwiseAnd (by_byte, low_mask)
    high_nibbles = BitShift <direction = "RIGHT"> (by_byte, four)
    half_axis = Constant <value_ints = [3]> ()
    low_lanes = Unsqueeze (low_nibbles, half_axis)
    high_lanes = Unsqueeze (high_nibbles, half_axis)
    lanes = Concat <axis = 3> (low_lanes, high_lanes)
    lane_shape = Concat <axis = 0> (groups, minus_one)
    all_lanes = Reshape (lanes, lane_shape)
    cut_lanes = Slice (all_lanes, zero, m, one_1d)
    less_one = Cast <to = 1> (cut_lanes)
    unit = Constant <value_float = 1.0> ()
    of_groups = Add (less_one, unit)
    sixteenth = Constant <value_float = 0.0625> ()
    scales32 = Cast <to = 1> (scales)
    scales_16 = Mul (scales32, sixteenth)
    products = Mul (of_groups, scales_16)
    product_row = Unsqueeze (products, one_1d)
    scaled = Mul (q16, product_row)
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
        (u, qweight, group_scales, scales, bias, absent, absent)
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
    for part, text in (("#PROLOGUE", PROLOGUE), ("#ROTATED", ROTATED), ("#FINISH", FINISH)):
        body = body.replace(part, text)
    function: FunctionProto = parser.parse_function(f"{header}\n{signature}\n{body}")
    function.doc_string = op.doc
    return function
