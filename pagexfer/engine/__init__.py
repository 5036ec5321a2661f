"""The untrusted host side: sockets, tasks, scheduling. Sees ciphertext and page numbers, never a key or a plaintext."""
