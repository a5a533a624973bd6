"""Attention over a KV cache as a model-local function of standard operators: what runs where our library is not
registered. Sizes as in attention.py; k and v are one tensor of 2K heads until they are cached.
"""

from __future__ import annotations

# placed_q, placed_k and v: float32 [B, heads, S, d], after rotary positions.
_HEADS = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    zero_0d = Constant <value_int = 0> ()
    one_0d = Constant <value_int = 1> ()
    zero_f = Constant <value_float = 0.0> ()
    one_f = Constant <value_float = 1.0> ()
    heads_0d = Constant <value_int: int = @num_heads> ()
    kv_heads_0d = Constant <value_int: int = @kv_num_heads> ()
    window = Constant <value_int: int = @local_window_size> ()
    heads = Reshape (heads_0d, one)
    kv_heads = Reshape (kv_heads_0d, one)
    both_heads = Add (kv_heads, kv_heads)
    turned_heads = Add (heads, kv_heads)
    all_heads = Add (heads, both_heads)

    q_and_k = Concat <axis = 0> (heads, kv_heads)

    x = Cast <to = 1> (qkv)
    batch_sequence = Shape <start = 0, end = 2> (qkv)
    batch = Shape <start = 0, end = 1> (qkv)
    sequence = Shape <start = 1, end = 2> (qkv)
    split_shape = Concat <axis = 0> (batch_sequence, all_heads, minus_one)
    by_token = Reshape (x, split_shape)
    by_head = Transpose <perm = [0, 2, 1, 3]> (by_token)
    turned_and_v = Concat <axis = 0> (turned_heads, kv_heads)
    unturned, v = Split <axis = 1> (by_head, turned_and_v)
    d = Shape <start = 3> (by_head)
    d_f = Cast <to = 1> (d)

    r = Shape <start = 1> (cos)
    two_r = Add (r, r)
    a = Slice (unturned, zero, r, minus_one)
    b = Slice (unturned, r, two_r, minus_one)
    still = Slice (unturned, two_r, d, minus_one)
    cos_rows = Gather (cos, position_ids)
    sin_rows = Gather (sin, position_ids)
    c = Unsqueeze (cos_rows, one)
    s = Unsqueeze (sin_rows, one)
    a_c = Mul (a, c)
    b_s = Mul (b, s)
    b_c = Mul (b, c)
    a_s = Mul (a, s)
    first = Sub (a_c, b_s)
    second = Add (b_c, a_s)
    turned = Concat <axis = -1> (first, second, still)

    placed_q, placed_k = Split <axis = 1> (turned, q_and_k)
    root_d = Sqrt (d_f)
    inverse_root = Div (one_f, root_d)
"""

# past_both [B, 2K, P, E] and rows [B, 2K, S, E] become present [B, 2K, T, E].
_APPEND = """
    before = Shape <start = 2, end = 3> (past_key)
    longest_32 = Reshape (total_sequence_length, one)
    longest = Cast <to = 7> (longest_32)
    capacity = Max (before, longest)
    missing = Sub (capacity, before)
    axis_2 = Constant <value_ints = [2]> ()
    no_pad = Constant <value_ints = [0]> ()
    pads = Concat <axis = 0> (no_pad, missing)
    padded = Pad (past_both, pads, nothing, axis_2)
    last = Cast <to = 7> (seqlens_k)
    total = Add (last, one_0d)
    all_new = Sub (total, sequence)
    start = Max (all_new, zero)
    capacity_0d = Squeeze (capacity)
    slot = Range (zero_0d, capacity_0d, one_0d)
    start_column = Unsqueeze (start, one)
    total_column = Unsqueeze (total, one)
    token = Sub (slot, start_column)
    is_after = GreaterOrEqual (token, zero)
    is_held = Less (slot, total_column)
    is_new = And (is_after, is_held)
    source = Where (is_new, token, zero)
    source_column = Unsqueeze (source, minus_one)
    rows_by_token = Transpose <perm = [0, 2, 1, 3]> (rows)
    placed_by_token = GatherND <batch_dims = 1> (rows_by_token, source_column)
    placed = Transpose <perm = [0, 2, 1, 3]> (placed_by_token)
    cache_axes = Constant <value_ints = [1, 3]> ()
    is_new_row = Unsqueeze (is_new, cache_axes)
    present = Where (is_new_row, placed, padded)
    halves = Concat <axis = 0> (kv_heads, kv_heads)
"""

# y of q [B, H, S, d] and dequantised [B, 2K, T, d].
_ATTEND = """
    is_held_row = Unsqueeze (is_held, cache_axes)
    seen = Where (is_held_row, dequantised, zero_f)
    keys, values = Split <axis = 1> (seen, halves)

    group_shape = Concat <axis = 0> (batch, kv_heads, minus_one, d)
    grouped = Reshape (q, group_shape)
    keys_t = Transpose <perm = [0, 1, 3, 2]> (keys)
    products = MatMul (grouped, keys_t)
    scale_attribute = Constant <value_float: float = @scale> ()
    is_default_scale = Equal (scale_attribute, zero_f)
    score_scale = Where (is_default_scale, inverse_root, scale_attribute)
    all_scores = Mul (products, score_scale)
    mask_shape = Concat <axis = 0> (batch, heads, sequence, capacity)
    by_query = Reshape (all_scores, mask_shape)
    sequence_0d = Squeeze (sequence)
    query_index = Range (zero_0d, sequence_0d, one_0d)
    query_slot = Add (query_index, start_column)
    query_column = Unsqueeze (query_slot, minus_one)
    distance = Sub (query_column, slot)
    is_past = GreaterOrEqual (distance, zero)
    in_window = Less (distance, window)
    no_window = LessOrEqual (window, zero_0d)
    is_near = Or (in_window, no_window)
    is_seen = And (is_past, is_near)
    is_seen_by_head = Unsqueeze (is_seen, one)
    infinity = Div (one_f, zero_f)
    minus_infinity = Neg (infinity)
    scores = Where (is_seen_by_head, by_query, minus_infinity)
    weights = Softmax <axis = -1> (scores)
    group_capacity = Concat <axis = 0> (batch, kv_heads, minus_one, capacity)
    grouped_weights = Reshape (weights, group_capacity)
    sums = MatMul (grouped_weights, values)
    output_shape = Concat <axis = 0> (batch, heads, sequence, d)
    output = Reshape (sums, output_shape)
    is_query = Less (query_slot, total_column)
    query_axes = Constant <value_ints = [1, 3]> ()
    is_query_row = Unsqueeze (is_query, query_axes)
    queried = Where (is_query_row, output, zero_f)
    output_by_token = Transpose <perm = [0, 2, 1, 3]> (queried)
    y_shape = Concat <axis = 0> (batch_sequence, minus_one)
    y_32 = Reshape (output_by_token, y_shape)
    y = CastLike (y_32, qkv)
"""

# Every float16 is a float32, so the cache is extended as the latter, which more operators take.
_ROUND = """
    q = Identity (placed_q)
    new = Concat <axis = 1> (placed_k, v)
    new_16 = Cast <to = 10> (new)
    rows = Cast <to = 1> (new_16)
    past_16 = Concat <axis = 1> (past_key, past_value)
    past_both = Cast <to = 1> (past_16)
    nothing = Constant <value_float = 0.0> ()
"""

_WIDEN = """
    present_16 = Cast <to = 10> (present)
    present_key, present_value = Split <axis = 1> (present_16, halves)
    dequantised = Identity (present)
"""


def kv_attention(store: str, read: str) -> str:
    """The function's body.

    store: from placed_q, placed_k and v to q, the cache's `rows`, past_both, and `nothing`, a cached zero; read: from
    present to present_key, present_value and dequantised.
    """
    return "{" + _HEADS + store + _APPEND + read + _ATTEND + "}\n"


HALF_KV_ATTENTION = kv_attention(_ROUND, _WIDEN)
