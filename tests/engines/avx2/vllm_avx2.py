"""A vLLM plugin: the library that vLLM loads where a processor has no AVX-512, on any x86-64.

vLLM asks torch for the processor's instructions, and no variable changes what torch finds.
With this folder in PYTHONPATH vLLM finds the plugin beside this file, as it finds every
installed one (``VLLM_PLUGINS=""`` turns it off again)::

    PYTHONPATH=tests/engines/avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        bash tests/run --engines -k vllm
"""

from vllm.platforms.cpu import CpuPlatform


class AVX2Platform(CpuPlatform):
    @classmethod
    def import_kernels(cls) -> None:
        try:
            import vllm._C_AVX2  # noqa: F401
        except ImportError as error:
            # Loaded all the same: the module in it is called _C, whatever the file.
            if "does not define module export function" not in str(error):
                raise


def platform() -> str:
    return "vllm_avx2.AVX2Platform"
