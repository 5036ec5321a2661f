# Guest code of the KVM guest: the workload of pagexfer/guests/pattern.py in 64-bit mode, one instance per vCPU.
#
# Regenerate GUEST_CODE in image.py after a change (tests/test_kvm_guest.py compares the two):
#
#     as --64 -o guest.o guest.S && objcopy -O binary -j .text guest.o guest.bin && xxd -p -c 48 guest.bin
#
# It is loaded at CODE_GPA and position independent. It starts with rdi = number of the vCPU, r13 = 1 and 0 in all other
# registers, identity page tables, no stack, no interrupts and no exception handlers: an exception is a triple fault,
# which the VMM reports.
#
# All of it runs in ring 3, which the I/O bitmap of the task segment lets use ports. Where KVM has no hardware
# virtualisation beneath it (kvm-pvm), ring 3 runs on the processor itself, while each instruction in ring 0 is
# emulated, a thousand times slower and without MMX and SSE. So a vCPU gives its turn back with OUT, for lack of HLT.
#
# Some constants live nowhere but in state that only a complete save and load keeps, so that state that gets lost
# makes every following page wrong:
#
#     seed            XMM0, low word
#     stride          XMM1, low word
#     COUNTER_FACTOR  MM7, which is part of the x87 registers
#
# Registers over the whole run:
#
#     r8   status page              r11  first gfn of the slice        r14  position (steps done in this round)
#     r9   control page             r12  pages of the slice            rbp  steps since the last exit for pacing
#     r10  own flag in it           r13  round
#
# A step is: verify one page against round r - 1, write round r, update the status page. The park flag is looked at
# between steps only, so status and pages always agree where a vCPU parks.

        .equ    CONTROL_GPA, 0xe0000000
        .equ    CONTROL_BATCH, 64               # steps between two exits for pacing; 0: idle, only tick
        .equ    CONTROL_OWN_FLAGS, 128          # one cache line per vCPU
        .equ    STATUS_GFN, 16
        .equ    STATUS_ROUND, 8
        .equ    STATUS_POSITION, 16
        .equ    STATUS_STEPS, 24
        .equ    STATUS_ERRORS, 32
        .equ    STATUS_BAD_GFN, 40
        .equ    STATUS_TICKS, 48
        .equ    STATUS_SEED, 64
        .equ    STATUS_FIRST_GFN, 72
        .equ    STATUS_SLICE_PAGES, 80
        .equ    STATUS_STRIDE, 88
        .equ    PACE_PORT, 0x10
        .equ    PARK_PORT, 0x11

        .text
        .code64
start:
        leaq    STATUS_GFN(%rdi), %r8
        shlq    $12, %r8
        movl    $CONTROL_GPA, %r9d
        shlq    $6, %rdi
        leaq    CONTROL_OWN_FLAGS(%r9,%rdi), %r10
        movq    STATUS_FIRST_GFN(%r8), %r11
        movq    STATUS_SLICE_PAGES(%r8), %r12

        movq    STATUS_SEED(%r8), %xmm0
        movq    STATUS_STRIDE(%r8), %xmm1
        movq    counter_factor(%rip), %mm7

step:
        movq    (%r9), %rax
        testq   %rax, %rax
        jnz     park
        cmpq    $0, CONTROL_BATCH(%r9)
        je      tick

        movq    %xmm1, %rax                     # gfn = first + position * stride % pages
        mulq    %r14
        divq    %r12
        leaq    (%rdx,%r11), %rsi
        movq    %rsi, %rdi
        shlq    $12, %rdi

        movq    %mm7, %rdx
        movq    %xmm0, %rax                     # r15 = x0 of round r, rax = x0 of round r - 1
        movq    gfn_factor(%rip), %rbx
        imulq   %rsi, %rbx
        addq    %rbx, %rax
        leaq    -1(%r13), %rbx
        movq    %rdx, %rcx
        imulq   %rbx, %rcx
        addq    %rcx, %rax
        leaq    (%rax,%rdx), %r15

        cmpq    %rsi, (%rdi)                    # verify; rbx = sum
        jne     bad
        cmpq    %rbx, 8(%rdi)
        jne     bad
        addq    %rsi, %rbx
        movl    $2, %ecx
1:      cmpq    %rax, (%rdi,%rcx,8)
        jne     bad
        addq    %rax, %rbx
        imulq   lcg_factor(%rip), %rax
        addq    lcg_increment(%rip), %rax
        incl    %ecx
        cmpl    $511, %ecx
        jb      1b
        cmpq    %rbx, (%rdi,%rcx,8)
        je      write
bad:
        incq    STATUS_ERRORS(%r8)
        movq    %rsi, STATUS_BAD_GFN(%r8)

write:
        movq    %r15, %rax
        movq    %rsi, (%rdi)
        movq    %r13, 8(%rdi)
        leaq    (%rsi,%r13), %rbx
        movl    $2, %ecx
2:      movq    %rax, (%rdi,%rcx,8)
        addq    %rax, %rbx
        imulq   lcg_factor(%rip), %rax
        addq    lcg_increment(%rip), %rax
        incl    %ecx
        cmpl    $511, %ecx
        jb      2b
        movq    %rbx, (%rdi,%rcx,8)

        incq    %r14
        cmpq    %r12, %r14
        jb      3f
        xorl    %r14d, %r14d
        incq    %r13
3:      movq    %r13, STATUS_ROUND(%r8)
        movq    %r14, STATUS_POSITION(%r8)
        incq    STATUS_STEPS(%r8)
        incq    %rbp
        cmpq    CONTROL_BATCH(%r9), %rbp
        jb      step
tick:
        incq    STATUS_TICKS(%r8)
        xorl    %ebp, %ebp
        outb    %al, $PACE_PORT
        jmp     step

park:
        movq    %rax, (%r10)                    # own flag = the ticket of this park
        outb    %al, $PARK_PORT
        jmp     step

        .balign 8
gfn_factor:     .quad 0x9e3779b97f4a7c15
counter_factor: .quad 0xc2b2ae3d27d4eb4f
lcg_factor:     .quad 0x5851f42d4c957f2d
lcg_increment:  .quad 0x14057b7ef767814f
