"""A vLLM plugin: a processor that has AVX2 and nothing newer, on any x86-64.

vLLM asks torch for the processor's instructions, by which it chooses its library and the
kernels in it, and no variable changes what torch answers. So torch is made to answer as there.
With this folder in PYTHONPATH vLLM finds the plugin beside this file, as it finds every
installed one (``VLLM_PLUGINS=""`` turns it off again)::

    PYTHONPATH=tests/engines/avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        DLP_KERNELS=avx2 bash tests/run --engines -k vllm
"""

import torch

NEWER = ("avx512", "avx10", "avx_vnni", "avx_ne_convert", "amx")


def platform() -> str:
    """Hide what is newer, in this process, before vLLM asks; the platform is its own."""
    has = torch.cpu.get_capabilities().items()
    older = {name: value for name, value in has if not name.startswith(NEWER)}
    torch.cpu.get_capabilities = lambda: older
    return "vllm.platforms.cpu.CpuPlatform"
