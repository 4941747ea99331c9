"""The engine's Triton kernels compile for an H200, with the constants they are used with; needs Triton, no GPU. The
interpreter, in which the other tests run them on a CPU, accepts more than the compiler.
"""

import os

import pytest

triton = pytest.importorskip("triton")
gpt2_decode = pytest.importorskip("regpt.kernels.gpt2_decode")
paged = pytest.importorskip("regpt.kernels.paged")
llama_decode = pytest.importorskip("regpt.kernels.llama_decode")
sampler = pytest.importorskip("regpt.kernels.sampler")
product = pytest.importorskip("regpt.kernels.product")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]
BF16, F32, I64, I32, FP8 = "*bf16", "*fp32", "*i64", "i32", "*fp8e4nv"
SHAPES = [(12, 64), (25, 64), (4, 32), (3, 8)]  # heads and their sizes


def compiles(kernel, arguments: dict[str, str], constants: dict[str, object], warps: int = 4) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(name),): value for name, value in constants.items()}
    )
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": False})


@pytest.mark.parametrize(("H", "D"), SHAPES)
@pytest.mark.parametrize(("kind", "held"), [(BF16, BF16), (F32, F32), (BF16, FP8)])
@pytest.mark.parametrize("window", [False, True])
def test_decode_attention(H, D, kind, held, window):
    arguments = {"q_ptr": kind, "k_ptr": held, "v_ptr": held, "table_ptr": I64, "position_ptr": I64, "out_ptr": kind}
    arguments |= dict.fromkeys(("q_row", "q_head", "kv_head", "table_row", "position_row", "window"), I32)
    arguments["scale"] = "fp32"
    constants = {"H": H, "G": H, "D": D, "BLOCK_D": triton.next_power_of_2(D), "PAGE": 16, "BLOCK": paged.BLOCK}
    compiles(paged.decode_attention_kernel, arguments, constants | {"WINDOW": window}, paged.WARPS)


@pytest.mark.parametrize(("H", "D"), SHAPES)
@pytest.mark.parametrize(("block", "warps"), [sizes for _, sizes in gpt2_decode.ATTENTION])
@pytest.mark.parametrize("held", [BF16, FP8])
def test_attend_and_write(H, D, block, warps, held):
    arguments = {"qkv_ptr": BF16, "k_ptr": held, "v_ptr": held, "table_ptr": I64, "position_ptr": I64, "out_ptr": BF16}
    arguments |= dict.fromkeys(("kv_head", "table_row", "position_row"), I32) | {"scale": "fp32"}
    constants = {"H": H, "D": D, "BLOCK_D": triton.next_power_of_2(D), "PAGE": 16, "PDL": True}
    compiles(gpt2_decode.attend_and_write_kernel, arguments, constants | {"BLOCK": block}, warps)


@pytest.mark.parametrize("C", [128, 768, 1600])
def test_norms_and_writes(C):
    whole = {"C": C, "BLOCK_C": triton.next_power_of_2(C)}
    common = {"weight_ptr": BF16, "bias_ptr": BF16, "x_ptr": F32, "h_ptr": BF16, "eps": "fp32"}
    inputs = {"token_ptr": I64, "position_ptr": I64, "stride": I32, "wte_ptr": BF16, "wpe_ptr": BF16}
    compiles(gpt2_decode.embed_norm_kernel, inputs | common, whole | {"PDL": True})
    compiles(gpt2_decode.add_norm_kernel, {"y_ptr": BF16, "y_bias_ptr": BF16} | common, whole | {"PDL": True})
    constants = {"H": C // 32, "D": 32, "BLOCK_C": whole["BLOCK_C"]}
    for held in (BF16, FP8):
        arguments = {"qkv_ptr": BF16, "k_ptr": held, "v_ptr": held, "slot_ptr": I64, "kv_head": I32}
        compiles(gpt2_decode.write_kernel, arguments, constants)


@pytest.mark.parametrize(
    ("K", "N", "norm", "gelu", "add"),
    [
        (768, 2304, True, False, False),
        (768, 768, False, False, True),
        (768, 3072, True, True, False),
        (3072, 768, False, False, True),
        (128, 512, True, True, False),
    ],
)
def test_products_of_one_vector(K, N, norm, gelu, add):
    x = F32 if norm else BF16
    arguments = {"x_ptr": x, "weight_ptr": BF16, "bias_ptr": BF16, "norm_weight_ptr": BF16, "norm_bias_ptr": BF16}
    arguments |= {"added_ptr": F32 if add else x, "out_ptr": F32 if add else BF16, "N": I32, "eps": "fp32"}
    block = triton.next_power_of_2(K)
    rows, warps = gpt2_decode.VECTOR_LONG if block > gpt2_decode.LARGEST_VECTOR else gpt2_decode.VECTOR_SHORT
    constants = {"K": K, "BLOCK_K": block, "ROWS": rows, "NORM": norm, "GELU": gelu, "ADD": add, "PDL": True}
    compiles(gpt2_decode.vector_kernel, arguments, constants, warps)


@pytest.mark.parametrize(
    ("K", "norm", "bias", "gated"), [(2048, 1, 0, 0), (2048, 1, 0, 1), (8192, 0, 0, 0), (896, 1, 1, 0)]
)
def test_products_of_llama(K, norm, bias, gated):
    pointers = (
        "norm_ptr",
        "first_ptr",
        "second_ptr",
        "third_ptr",
        "first_bias_ptr",
        "second_bias_ptr",
        "third_bias_ptr",
    )
    arguments = dict.fromkeys(pointers, BF16) | {"x_ptr": F32 if norm else BF16, "added_ptr": F32, "eps": "fp32"}
    arguments |= {"out_ptr": BF16 if norm else F32, "first_rows": I32, "second_rows": I32}
    rows, warps = next(sizes for most, sizes in llama_decode.ROWS_AND_WARPS if most >= K)
    constants = {"K": K, "BLOCK_K": triton.next_power_of_2(K), "ROWS": rows, "NORM": bool(norm), "BIAS": bool(bias)}
    compiles(
        llama_decode.products_kernel, arguments, constants | {"GATED": bool(gated), "ADD": not norm, "PDL": True}, warps
    )


@pytest.mark.parametrize(("H", "G", "D"), [(32, 8, 64), (32, 8, 128), (6, 2, 16)])
@pytest.mark.parametrize("held", [BF16, FP8])
def test_rotate_and_attend(H, G, D, held):
    arguments = dict.fromkeys(("k_ptr", "v_ptr"), held) | dict.fromkeys(("qkv_ptr", "out_ptr"), BF16)
    arguments |= {"cos_ptr": F32, "sin_ptr": F32}
    arguments |= {"page_ptr": I64, "position_ptr": I64, "kv_head": I32, "scale": "fp32"}
    constants = {"H": H, "G": G, "D": D, "PAGE": 16, "BLOCK": llama_decode.ATTENTION_BLOCK, "PDL": True}
    compiles(llama_decode.rotate_and_attend_kernel, arguments, constants, llama_decode.ATTENTION_WARPS)


@pytest.mark.parametrize("chunks", [1, 2, 25])
def test_draws(chunks):
    groups = {"logits_ptr": F32, "key_ptr": I64, "sum_ptr": F32, "row_stride": I32, "V": I32}
    sizes = {"CHUNK": sampler.CHUNK, "GROUP": sampler.GROUP, "PDL": True}
    compiles(sampler.groups_kernel, groups, sizes, sampler.CHUNK_WARPS)
    arguments = {"logits_ptr": F32, "key_ptr": I64, "sum_ptr": F32, "room_ptr": I64, "state_ptr": I64}
    arguments |= dict.fromkeys(("chunks", "groups", "row_stride", "state_stride", "V"), I32) | {"out_ptr": "*fp64"}
    power = triton.next_power_of_2
    keys = power(chunks * sampler.CHUNK // sampler.GROUP)
    constants = {"K": sampler.MOST, "GROUP": sampler.GROUP, "KEYS": keys, "CHUNKS": power(chunks), "PDL": True}
    compiles(sampler.draw_kernel, arguments, constants, sampler.ROW_WARPS)


@pytest.mark.parametrize("columns", [product.NARROW, product.WIDE])
@pytest.mark.parametrize("group", [0, product.GROUP])
@pytest.mark.parametrize(("out", "bias"), [(BF16, True), (F32, False)])
def test_products_in_a_fixed_order(columns, group, out, bias):
    arguments = {"x_ptr": BF16, "weight_ptr": "*i8" if group else BF16, "y_ptr": out, "M": I32, "N": I32}
    arguments |= {"scale_ptr": "*fp16"} if group else {}
    arguments |= {"bias_ptr": BF16} if bias else {}
    sizes = {"K": 768, "BLOCK_M": product.BLOCK_M, "BLOCK_N": columns, "BLOCK_K": product.BLOCK_K}
    nothing = ({} if group else {"scale_ptr": None}) | ({} if bias else {"bias_ptr": None})
    compiles(product.product_kernel, arguments, nothing | sizes | {"GROUP": group, "BIAS": bias}, product.WARPS)
