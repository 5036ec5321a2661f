"""Numbers and structures of /dev/kvm on x86-64, named as in <linux/kvm.h> and <asm/kvm.h>.

The memory slot and dirty log numbers are in `dirty.kvm_log`, which may not import this.
"""

from __future__ import annotations

import struct
from typing import Final

KVM_API_VERSION: Final = 12

# System
KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01
KVM_GET_MSR_INDEX_LIST: Final = 0xC004_AE02
KVM_CHECK_EXTENSION: Final = 0xAE03
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_GET_SUPPORTED_CPUID: Final = 0xC008_AE05

# VM
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_CLOCK: Final = 0x4030_AE7B
KVM_GET_CLOCK: Final = 0x8030_AE7C

# vCPU
KVM_RUN: Final = 0xAE80
KVM_GET_REGS: Final = 0x8090_AE81
KVM_SET_REGS: Final = 0x4090_AE82
KVM_GET_SREGS: Final = 0x8138_AE83
KVM_SET_SREGS: Final = 0x4138_AE84
KVM_GET_MSRS: Final = 0xC008_AE88
KVM_SET_MSRS: Final = 0x4008_AE89
KVM_SET_SIGNAL_MASK: Final = 0x4004_AE8B
KVM_SET_CPUID2: Final = 0x4008_AE90
KVM_GET_MP_STATE: Final = 0x8004_AE98
KVM_SET_MP_STATE: Final = 0x4004_AE99
KVM_GET_VCPU_EVENTS: Final = 0x8040_AE9F
KVM_SET_VCPU_EVENTS: Final = 0x4040_AEA0
KVM_GET_DEBUGREGS: Final = 0x8080_AEA1
KVM_SET_DEBUGREGS: Final = 0x4080_AEA2
KVM_SET_TSC_KHZ: Final = 0xAEA2  # by its argument and not by memory, hence another number than the one above
KVM_GET_TSC_KHZ: Final = 0xAEA3
KVM_GET_XSAVE: Final = 0x9000_AEA4
KVM_SET_XSAVE: Final = 0x5000_AEA5
KVM_GET_XCRS: Final = 0x8188_AEA6
KVM_SET_XCRS: Final = 0x4188_AEA7
KVM_GET_XSAVE2: Final = 0x9000_AECF

KVM_CAP_TSC_CONTROL: Final = 60
KVM_CAP_XSAVE2: Final = 208

# Sizes that the numbers above carry in bits 16 to 29
REGS_BYTES: Final = 144
SREGS_BYTES: Final = 312
MP_STATE_BYTES: Final = 4
VCPU_EVENTS_BYTES: Final = 64
DEBUGREGS_BYTES: Final = 128
XSAVE_BYTES: Final = 4096  # least; KVM_CAP_XSAVE2 tells of more
XCRS_BYTES: Final = 392

# struct kvm_cpuid2 and struct kvm_msrs: number of entries u32, padding u32, entries
ENTRIES_HEADER: Final = struct.Struct("<II")
# struct kvm_cpuid_entry2: function u32, index u32, flags u32, eax ebx ecx edx u32, padding
CPUID_ENTRY: Final = struct.Struct("<7I12x")
# struct kvm_msr_entry: index u32, reserved u32, data u64
MSR_ENTRY: Final = struct.Struct("<IIQ")
# What KVM_GET_TSC_KHZ returns
TSC_KHZ: Final = struct.Struct("<I")
# struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8 .. r15 rip rflags
REGS: Final = struct.Struct("<18Q")
REGS_R13: Final = 13
REGS_R14: Final = 14
# struct kvm_segment: base u64, limit u32, selector u16, type, present, dpl, db, s, l, g, avl, unusable u8, padding
SEGMENT: Final = struct.Struct("<QIH8B2x")
# struct kvm_sregs: segments cs ds es fs gs ss tr ldt, tables gdt idt, cr0 cr2 cr3 cr4 cr8 efer apic_base, bitmap
SREGS_CONTROL: Final = struct.Struct("<7Q")
SREGS_CONTROL_OFFSET: Final = 0xE0
# struct kvm_debugregs: db[4] u64, dr6 u64, dr7 u64, flags u64, reserved
DEBUGREGS: Final = struct.Struct("<7Q72x")
# struct kvm_clock_data: clock u64 (ns), flags u32, and more that only later kernels use
CLOCK: Final = struct.Struct("<QI36x")

# struct kvm_run
RUN_IMMEDIATE_EXIT_OFFSET: Final = 1
RUN_EXIT_REASON: Final = struct.Struct("<I")
RUN_EXIT_REASON_OFFSET: Final = 8
# Exit KVM_EXIT_IO: direction u8, size u8, port u16
RUN_IO: Final = struct.Struct("<BBH")
RUN_IO_OFFSET: Final = 0x20
KVM_EXIT_IO: Final = 2
KVM_EXIT_IO_OUT: Final = 1

assert REGS.size == REGS_BYTES
assert DEBUGREGS.size == DEBUGREGS_BYTES
assert CPUID_ENTRY.size == 40
assert MSR_ENTRY.size == 16
assert SREGS_CONTROL_OFFSET + SREGS_CONTROL.size + 32 == SREGS_BYTES
assert CLOCK.size == 48


def counted(entries: bytes, entry_bytes: int) -> bytearray:
    """`entries` as KVM takes them, behind a header with their number."""
    return bytearray(ENTRIES_HEADER.pack(len(entries) // entry_bytes, 0) + entries)
