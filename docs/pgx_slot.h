/* Mailbox slot, version 3; docs/protocol.md, section 4, is normative. All integers are little endian.
   A doorbell is an eventfd: a write that would block (EAGAIN) finds it rung already, and is done.
   C99 or later, C++11 or later, also freestanding. Made by python -m pagexfer.wire.slot_header. */
#ifndef PGX_SLOT_H
#define PGX_SLOT_H

#include <stddef.h>
#include <stdint.h>

#define PGX_SLOT_MAGIC UINT64_C(0x33544f4c53584750) /* PGXSLOT3 */
#define PGX_SLOT_VERSION 3
#define PGX_REGISTER_PAGE_BYTES 4096
#define PGX_HEADROOM_BYTES 64
#define PGX_MIN_BUFFERS 2
#define PGX_MAX_BUFFERS 8
#define PGX_MIN_BUFFER_SHIFT 16
#define PGX_MAX_BUFFER_SHIFT 22
#define PGX_NO_BUFFER 65535
#define PGX_CONTROL_SLOT 65535
#define PGX_MAX_DEVICE_STATE_PART_BYTES 1048576
#define PGX_MAX_DEVICE_STATE_BYTES 268435456

/* Where the lines are in the register page. */
#define PGX_IDENTITY_OFFSET 0
#define PGX_COMMAND_OFFSET 64
#define PGX_STATUS_OFFSET 128
#define PGX_HOST_DATA_OFFSET 192
#define PGX_SVSM_DATA_OFFSET 256

/* The parts of a word of host_data or svsm_data, and the word of both. */
#define PGX_BUFFER_STATE(word) ((uint32_t)(word) & 0xff)
#define PGX_BUFFER_TURN(word) ((uint32_t)(word) >> 8)
#define PGX_BUFFER_WORD(state, turn) ((uint32_t)(turn) << 8 | (uint32_t)(state))

enum pgx_command {
    PGX_COMMAND_PREPARE = 1,
    PGX_COMMAND_SETUP = 2,
    PGX_COMMAND_EPOCH = 3,
    PGX_COMMAND_EXPORT = 4,
    PGX_COMMAND_IMPORT = 5,
    PGX_COMMAND_BLACKOUT = 6,
    PGX_COMMAND_STATE = 7,
    PGX_COMMAND_TOKEN = 8,
    PGX_COMMAND_FINISH = 9,
    PGX_COMMAND_ABORT = 10,
    PGX_COMMAND_HINT = 11,
    PGX_COMMAND_CONFIRM = 12,
    PGX_COMMAND_AUDIT = 13,
    PGX_COMMAND_REPLACE = 14,
};

enum pgx_slot_status {
    PGX_SLOT_STATUS_OK = 1,
    PGX_SLOT_STATUS_INCOMPLETE = 2,
    PGX_SLOT_STATUS_REFUSED = 3,
};

enum pgx_refusal {
    PGX_REFUSAL_COMMAND = 1,
    PGX_REFUSAL_STATE = 2,
    PGX_REFUSAL_NOT_READY = 3,
    PGX_REFUSAL_INTEGRITY = 4,
    PGX_REFUSAL_AUTHENTICATION = 5,
    PGX_REFUSAL_GEOMETRY = 6,
    PGX_REFUSAL_EXHAUSTED = 7,
    PGX_REFUSAL_GUEST = 8,
    PGX_REFUSAL_INTERNAL = 9,
    PGX_REFUSAL_POLICY = 10,
    PGX_REFUSAL_JOURNAL = 11,
    PGX_REFUSAL_COMPRESSION = 12,
};

enum pgx_session {
    PGX_SESSION_IDLE = 1,
    PGX_SESSION_PREPARED = 2,
    PGX_SESSION_KEYED = 3,
    PGX_SESSION_PRECOPY = 4,
    PGX_SESSION_PARKED = 5,
    PGX_SESSION_STARTED = 6,
    PGX_SESSION_FINISHED = 7,
    PGX_SESSION_ABORTED = 8,
    PGX_SESSION_IMPORTING = 9,
    PGX_SESSION_VERIFIED = 10,
    PGX_SESSION_RUNNING = 11,
    PGX_SESSION_FAILED = 12,
    PGX_SESSION_PROVED = 13,
};

enum pgx_buffer_state {
    PGX_BUFFER_STATE_FREE = 1,
    PGX_BUFFER_STATE_FILLING = 2,
    PGX_BUFFER_STATE_READY = 3,
    PGX_BUFFER_STATE_DRAINING = 4,
};

struct pgx_identity_line {
    uint64_t magic; /* "PGXSLOT3" */
    uint16_t version;
    uint16_t slot_id; /* number of the channel, or the control slot */
    uint16_t buffers;
    uint16_t buffer_shift; /* log2 of buffer bytes */
    uint16_t headroom_bytes;
    uint8_t reserved[46]; /* zero */
};

struct pgx_command_line {
    uint32_t sequence; /* raised by one for each command, written last */
    uint16_t command;
    uint16_t buffer; /* 0xFFFF for none */
    uint64_t argument;
    uint64_t argument2;
    uint32_t length; /* of the package in the buffer */
    uint8_t reserved[36]; /* zero */
};

struct pgx_status_line {
    uint32_t sequence; /* of the command that is answered, written last */
    uint16_t status;
    uint16_t error; /* 0 for none */
    uint16_t session; /* the status register */
    uint16_t buffer; /* 0xFFFF for none */
    uint32_t length; /* of the package in the buffer */
    uint64_t result;
    uint64_t result2;
    uint8_t reserved[32]; /* zero */
};

struct pgx_device_part {
    uint32_t total_bytes; /* of the whole device state */
    uint32_t offset; /* of this part's first byte in it */
};

struct pgx_registers {
    struct pgx_identity_line identity; /* at 0 */
    struct pgx_command_line command; /* at 64 */
    struct pgx_status_line status; /* at 128 */
    uint32_t host_data[16]; /* at 192: a word for each buffer, bits 0-7 state, bits 8-31 turn */
    uint32_t svsm_data[16]; /* at 256: a word for each buffer, bits 0-7 state, bits 8-31 turn */
    uint8_t reserved[3776];
};

/* An array of a negative size where a layout moved: C99 has no static assertion. */
#define PGX_CHECK(name, holds) typedef char pgx_check_##name[(holds) ? 1 : -1]

PGX_CHECK(identity_line_magic, offsetof(struct pgx_identity_line, magic) == 0);
PGX_CHECK(identity_line_version, offsetof(struct pgx_identity_line, version) == 8);
PGX_CHECK(identity_line_slot_id, offsetof(struct pgx_identity_line, slot_id) == 10);
PGX_CHECK(identity_line_buffers, offsetof(struct pgx_identity_line, buffers) == 12);
PGX_CHECK(identity_line_buffer_shift, offsetof(struct pgx_identity_line, buffer_shift) == 14);
PGX_CHECK(identity_line_headroom_bytes, offsetof(struct pgx_identity_line, headroom_bytes) == 16);
PGX_CHECK(identity_line_reserved, offsetof(struct pgx_identity_line, reserved) == 18);
PGX_CHECK(identity_line, sizeof(struct pgx_identity_line) == 64);
PGX_CHECK(command_line_sequence, offsetof(struct pgx_command_line, sequence) == 0);
PGX_CHECK(command_line_command, offsetof(struct pgx_command_line, command) == 4);
PGX_CHECK(command_line_buffer, offsetof(struct pgx_command_line, buffer) == 6);
PGX_CHECK(command_line_argument, offsetof(struct pgx_command_line, argument) == 8);
PGX_CHECK(command_line_argument2, offsetof(struct pgx_command_line, argument2) == 16);
PGX_CHECK(command_line_length, offsetof(struct pgx_command_line, length) == 24);
PGX_CHECK(command_line_reserved, offsetof(struct pgx_command_line, reserved) == 28);
PGX_CHECK(command_line, sizeof(struct pgx_command_line) == 64);
PGX_CHECK(status_line_sequence, offsetof(struct pgx_status_line, sequence) == 0);
PGX_CHECK(status_line_status, offsetof(struct pgx_status_line, status) == 4);
PGX_CHECK(status_line_error, offsetof(struct pgx_status_line, error) == 6);
PGX_CHECK(status_line_session, offsetof(struct pgx_status_line, session) == 8);
PGX_CHECK(status_line_buffer, offsetof(struct pgx_status_line, buffer) == 10);
PGX_CHECK(status_line_length, offsetof(struct pgx_status_line, length) == 12);
PGX_CHECK(status_line_result, offsetof(struct pgx_status_line, result) == 16);
PGX_CHECK(status_line_result2, offsetof(struct pgx_status_line, result2) == 24);
PGX_CHECK(status_line_reserved, offsetof(struct pgx_status_line, reserved) == 32);
PGX_CHECK(status_line, sizeof(struct pgx_status_line) == 64);
PGX_CHECK(device_part_total_bytes, offsetof(struct pgx_device_part, total_bytes) == 0);
PGX_CHECK(device_part_offset, offsetof(struct pgx_device_part, offset) == 4);
PGX_CHECK(device_part, sizeof(struct pgx_device_part) == 8);
PGX_CHECK(registers_identity, offsetof(struct pgx_registers, identity) == PGX_IDENTITY_OFFSET);
PGX_CHECK(registers_command, offsetof(struct pgx_registers, command) == PGX_COMMAND_OFFSET);
PGX_CHECK(registers_status, offsetof(struct pgx_registers, status) == PGX_STATUS_OFFSET);
PGX_CHECK(registers_host_data, offsetof(struct pgx_registers, host_data) == PGX_HOST_DATA_OFFSET);
PGX_CHECK(registers_svsm_data, offsetof(struct pgx_registers, svsm_data) == PGX_SVSM_DATA_OFFSET);
PGX_CHECK(registers, sizeof(struct pgx_registers) == PGX_REGISTER_PAGE_BYTES);
#undef PGX_CHECK

#endif
