# SPDX-License-Identifier: Apache-2.0
"""wine_lacks.py - four functions of Microsoft's C library that torch calls while it is loaded, and
that are stubs in wine which end the process. This writes their machine code into the stubs. The
Python under wine imports it as it starts; a real Windows has no use for it.
"""

import ctypes
from ctypes import wintypes

# A pair of doubles comes by its address in rcx, a pair of floats in rcx itself.
CODE = {
    "creal": "f20f1001c3",  # movsd xmm0, [rcx]; ret
    "cimag": "f20f104108c3",  # movsd xmm0, [rcx + 8]; ret
    "crealf": "660f6ec1c3",  # movd xmm0, ecx; ret
    "cimagf": "48c1e920660f6ec1c3",  # shr rcx, 32; movd xmm0, ecx; ret
}
READ_WRITE_EXECUTE = 0x40

for _name, _code in CODE.items():
    _at = ctypes.cast(getattr(ctypes.WinDLL("ucrtbase"), _name), ctypes.c_void_p)  # type: ignore[attr-defined]
    _data, _before = bytes.fromhex(_code), wintypes.DWORD()
    _arguments = (_at, ctypes.c_size_t(len(_data)), READ_WRITE_EXECUTE, ctypes.byref(_before))
    if not ctypes.WinDLL("kernel32").VirtualProtect(*_arguments):  # type: ignore[attr-defined]
        raise OSError(f"the stub of {_name} cannot be written")
    ctypes.memmove(_at, _data, len(_data))
