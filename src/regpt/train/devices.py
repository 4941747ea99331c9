"""Data-sheet figures of GPUs: the base of MFU and of plans.

Dense figures: data sheets that print the doubled figure of structured sparsity are halved. Tensor-core figures are
those that accumulate in float32, as training needs (GeForce cards run these at half the rate of float16 accumulation).
Memory is what PyTorch reports as the card's total (`torch.cuda.get_device_properties`, also in its out-of-memory
messages); it is below the figure on the box, by more where error correction takes a share.
"""

import re
from dataclasses import dataclass

from regpt.errors import UsageError, nearest


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Attributes:
        name: how it is called here, and on the command line (spaces, case and hyphens do not matter).
        driver: words that all occur in the name that its driver gives; the first device that matches is taken.
        also: other names that a user may type.
        capability: CUDA's compute capability; None for other makers.
        fp32, tf32, bf16, fp16, fp8: dense TFLOP/s; None where the card has no such units or nothing is published.
        memory_gib: memory that PyTorch reports, GiB.
        bandwidth: of that memory, GB/s.
        link: to another such GPU of one host, GB/s each way: NVLink or Infinity Fabric where it has one, else PCIe.
        source: where the figures are from.
    """

    name: str
    driver: tuple[str, ...]
    also: tuple[str, ...]
    capability: float | None
    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float | None
    fp8: float | None
    memory_gib: float
    bandwidth: float
    link: float | None
    source: str

    @property
    def peak_precision(self) -> str:
        """The format that MFU is measured in: bfloat16, float16 where there is none, float32 where there is neither."""
        return next(name for name in ("bf16", "fp16", "fp32") if getattr(self, name))

    def mfu_precision(self, precision: str) -> str:
        """The format that the MFU of a run in `precision` is measured in: FP8 for one in FP8, though its attention and
        head are computed in bfloat16; else `peak_precision`."""
        return "fp8" if precision == "fp8" and self.fp8 else self.peak_precision

    def peak(self, precision: str) -> float:
        """FLOP/s of which the MFU of a run in `precision` is a share."""
        return getattr(self, self.mfu_precision(precision)) * 1e12

    @property
    def peak_flops(self) -> float:
        """FLOP/s in `peak_precision`."""
        return getattr(self, self.peak_precision) * 1e12


BF16_CAPABILITY = 8.0  # Ampere

APPLE = "Apple press release of {}; later chips, and matrix products, have no published figure"
H100 = "NVIDIA H100 Tensor Core GPU data sheet (2024); Hopper white paper, table 2"
H200 = "NVIDIA H200 Tensor Core GPU data sheet (2024)"
GH200 = "NVIDIA GH200 Grace Hopper Superchip data sheet (2024), 96 GB"
GB200 = "NVIDIA GB200 NVL72 data sheet (2025), one of 72 GPUs"
B200 = "NVIDIA HGX B200 data sheet (2025), one of 8 GPUs"
A100 = "NVIDIA A100 Tensor Core GPU data sheet (2021)"
A30 = "NVIDIA A30 data sheet (2022)"
A40 = "NVIDIA A40 data sheet (2021)"
A10G = "NVIDIA A10G data sheet for AWS (2022)"
A10 = "NVIDIA A10 data sheet (2021)"
L4 = "NVIDIA L4 data sheet (2023)"
L40S = "NVIDIA L40S data sheet (2023)"
L40 = "NVIDIA L40 data sheet (2022)"
ADA6000 = "NVIDIA RTX 6000 Ada Generation data sheet (2023)"
A6000 = "NVIDIA RTX A6000 data sheet (2021); Ampere GA102 white paper, appendix"
AMPERE = "NVIDIA Ampere GA102 white paper (2021), table 2"
ADA = "NVIDIA Ada architecture white paper (2022), table 2"
RTX50 = "NVIDIA RTX Blackwell architecture white paper (2025), table 2"
V100 = "NVIDIA V100 data sheet (2020), 16 GB"
T4 = "NVIDIA T4 data sheet (2019)"
P100 = "NVIDIA P100 data sheet (2016), 16 GB"
MI300X = "AMD Instinct MI300X data sheet (2023)"
MI325X = "AMD Instinct MI325X data sheet (2024)"
M1U = APPLE.format("M1 Ultra (2022)")
M1X = APPLE.format("M1 Max (2021)")
M1P = APPLE.format("M1 Pro (2021)")
M1 = APPLE.format("M1 (2020)")
M2 = APPLE.format("M2 (2022)")


def gpu(name: str, driver: str, also: str, capability: float | None, *figures: float | str | None) -> Device:
    """One row of the table; words of the driver's name and other names as one string each. Figures as in `Device`, but
    that those of bfloat16 and float16 are one: they are equal wherever both exist, and cards before Ampere have no
    bfloat16."""
    fp32, tf32, half, *rest = figures
    bf16 = half if capability is None or capability >= BF16_CAPABILITY else None
    others = tuple(filter(None, also.split(", ")))
    return Device(name, tuple(driver.split()), others, capability, fp32, tf32, bf16, half, *rest)  # type: ignore[arg-type]


# fmt: off
DEVICES = (
    #   name              driver's words    also typed  cap.  fp32   tf32   half    fp8     GiB    GB/s  link  source
    gpu("H100 SXM",       "h100 hbm3",      "h100",     9.0,  66.9,  494.7, 989.4,  1978.9, 79.1,  3350, 450,  H100),
    gpu("H100 PCIe",      "h100 pcie",      "",         9.0,  51.2,  378,   756,    1513,   79.1,  2000, 64,   H100),
    gpu("H100 NVL",       "h100 nvl",       "",         9.0,  60,    417.5, 835.5,  1670.5, 93.1,  3900, 300,  H100),
    gpu("H200 NVL",       "h200 nvl",       "",         9.0,  60,    417.5, 835.5,  1670.5, 139.7, 4800, 450,  H200),
    gpu("H200 SXM",       "h200",           "h200",     9.0,  66.9,  494.7, 989.4,  1978.9, 139.7, 4800, 450,  H200),
    gpu("GH200",          "gh200",          "",         9.0,  66.9,  494.7, 989.4,  1978.9, 94.5,  4000, 450,  GH200),
    gpu("GB200",          "gb200",          "",         10.0, 80,    1250,  2500,   5000,   184,   8000, 900,  GB200),
    gpu("B200",           "b200",           "",         10.0, 75,    1125,  2250,   4500,   178.3, 8000, 900,  B200),
    gpu("A100 80GB PCIe", "a100 80gb pcie", "",         8.0,  19.5,  156,   312,    None,   79.1,  1935, 32,   A100),
    gpu("A100 80GB SXM",  "a100 80gb",      "a100",     8.0,  19.5,  156,   312,    None,   79.1,  2039, 300,  A100),
    gpu("A100 40GB",      "a100 40gb",      "",         8.0,  19.5,  156,   312,    None,   39.4,  1555, 300,  A100),
    gpu("A30",            "a30",            "",         8.0,  10.3,  82,    165,    None,   23.5,  933,  32,   A30),
    gpu("A40",            "a40",            "",         8.6,  37.4,  74.8,  149.7,  None,   44.4,  696,  32,   A40),
    gpu("A10G",           "a10g",           "",         8.6,  31.5,  35,    70,     None,   22,    600,  32,   A10G),
    gpu("A10",            "a10",            "",         8.6,  31.2,  62.5,  125,    None,   22,    600,  32,   A10),
    gpu("L4",             "l4",             "",         8.9,  30.3,  60,    121,    242.5,  22,    300,  32,   L4),
    gpu("L40S",           "l40s",           "",         8.9,  91.6,  183,   362.05, 733,    44.4,  864,  32,   L40S),
    gpu("L40",            "l40",            "",         8.9,  90.5,  90.5,  181.05, 362,    44.4,  864,  32,   L40),
    gpu("RTX 6000 Ada",   "6000 ada",       "6000 ada", 8.9,  91.1,  182.1, 364.25, 728.5,  47.4,  960,  32,   ADA6000),
    gpu("RTX A6000",      "a6000",          "a6000",    8.6,  38.7,  77.4,  154.8,  None,   47.4,  768,  32,   A6000),
    gpu("RTX 3090",       "3090",           "3090",     8.6,  35.6,  35.6,  71,     None,   23.7,  936,  32,   AMPERE),
    gpu("RTX 4090",       "4090",           "4090",     8.9,  82.6,  82.6,  165.2,  330.3,  23.5,  1008, 32,   ADA),
    gpu("RTX 5090",       "5090",           "5090",     12.0, 104.8, 104.8, 209.5,  419,    31.3,  1792, 64,   RTX50),
    gpu("V100 SXM2",      "v100 sxm2",      "v100",     7.0,  15.7,  None,  125,    None,   15.8,  900,  150,  V100),
    gpu("V100 PCIe",      "v100 pcie",      "",         7.0,  14,    None,  112,    None,   15.8,  900,  16,   V100),
    gpu("T4",             "t4",             "",         7.5,  8.1,   None,  65,     None,   14.6,  320,  16,   T4),
    gpu("P100 PCIe",      "p100 pcie",      "p100",     6.0,  9.3,   None,  18.7,   None,   15.9,  732,  16,   P100),
    gpu("MI300X",         "mi300x",         "",         None, 163.4, 653.7, 1307.4, 2614.9, 191.7, 5300, 448,  MI300X),
    gpu("MI325X",         "mi325x",         "",         None, 163.4, 653.7, 1307.4, 2614.9, 255.7, 6000, 448,  MI325X),
    gpu("Apple M1 Ultra", "apple m1 ultra", "m1 ultra", None, 21,    None,  None,   None,   48,    800,  None, M1U),
    gpu("Apple M1 Max",   "apple m1 max",   "m1 max",   None, 10.4,  None,  None,   None,   24,    400,  None, M1X),
    gpu("Apple M1 Pro",   "apple m1 pro",   "m1 pro",   None, 5.2,   None,  None,   None,   12,    200,  None, M1P),
    gpu("Apple M1",       "apple m1",       "m1",       None, 2.6,   None,  None,   None,   6,     68,   None, M1),
    gpu("Apple M2",       "apple m2",       "m2",       None, 3.6,   None,  None,   None,   6,     100,  None, M2),
)
# fmt: on
# Apple's memory is shared with the CPU and comes in several sizes: three quarters of the smallest, the share that Metal
# recommends. On the machine itself the real figure is read.

# A driver's name with one of these words is another, smaller product, although the other words match: a slice of a
# GPU, a laptop's, a variant with fewer cores. Measured instead.
OTHER_PRODUCT = {"mig", "laptop", "max-q", "q", "d", "ti", "super", "vgpu", "grid", "mobile"}
APPLE_SIZES = {"pro", "max", "ultra"}
MAKERS = r"nvidia|geforce|tesla|quadro|amd|instinct|generation"


def device_by_driver(name: str) -> Device | None:
    """The device that a driver calls `name`, such as `NVIDIA H100 80GB HBM3`; None when the table does not have it."""
    words = set(re.split(r"[\s_/-]+", name.lower()))
    if words & OTHER_PRODUCT or re.search(r"\d+g\.\d+gb", name):
        return None
    for device in DEVICES:
        wanted = set(device.driver)
        if wanted <= words and not ("apple" in words and (words & APPLE_SIZES) - wanted):
            return device
    return None


def device_by_name(typed: str) -> Device:
    """The device that a user calls `typed`: `h100`, `A100-80GB`, `RTX 4090`, `4090`, …

    Raises:
        UsageError: the table has no such device.
    """
    names = {plain(name): device for device in DEVICES for name in (device.name, *device.also)}
    if device := names.get(plain(typed)) or device_by_driver(typed):
        return device
    known = ", ".join(device.name for device in DEVICES)
    close = nearest(plain(typed), names)
    raise UsageError(f"no data sheet is known of a GPU called {typed!r}{close}; give cpu, or one of {known}")


def plain(name: str) -> str:
    """Lower case, without makers, spaces and hyphens."""
    return re.sub(rf"{MAKERS}|[^a-z0-9]", "", name.lower())
