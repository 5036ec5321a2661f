/* Mailbox slot, version 3; docs/protocol.md, section 4, is normative. All integers are little endian.
   Made by python -m pagexfer.wire.slot_header. */
#ifndef PGX_SLOT_H
#define PGX_SLOT_H

#include <assert.h>
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

static_assert(offsetof(struct pgx_identity_line, magic) == 0, "identity_line.magic");
static_assert(offsetof(struct pgx_identity_line, version) == 8, "identity_line.version");
static_assert(offsetof(struct pgx_identity_line, slot_id) == 10, "identity_line.slot_id");
static_assert(offsetof(struct pgx_identity_line, buffers) == 12, "identity_line.buffers");
static_assert(offsetof(struct pgx_identity_line, buffer_shift) == 14, "identity_line.buffer_shift");
static_assert(offsetof(struct pgx_identity_line, headroom_bytes) == 16, "identity_line.headroom_bytes");
static_assert(offsetof(struct pgx_identity_line, reserved) == 18, "identity_line.reserved");
static_assert(sizeof(struct pgx_identity_line) == 64, "identity_line");
static_assert(offsetof(struct pgx_command_line, sequence) == 0, "command_line.sequence");
static_assert(offsetof(struct pgx_command_line, command) == 4, "command_line.command");
static_assert(offsetof(struct pgx_command_line, buffer) == 6, "command_line.buffer");
static_assert(offsetof(struct pgx_command_line, argument) == 8, "command_line.argument");
static_assert(offsetof(struct pgx_command_line, argument2) == 16, "command_line.argument2");
static_assert(offsetof(struct pgx_command_line, length) == 24, "command_line.length");
static_assert(offsetof(struct pgx_command_line, reserved) == 28, "command_line.reserved");
static_assert(sizeof(struct pgx_command_line) == 64, "command_line");
static_assert(offsetof(struct pgx_status_line, sequence) == 0, "status_line.sequence");
static_assert(offsetof(struct pgx_status_line, status) == 4, "status_line.status");
static_assert(offsetof(struct pgx_status_line, error) == 6, "status_line.error");
static_assert(offsetof(struct pgx_status_line, session) == 8, "status_line.session");
static_assert(offsetof(struct pgx_status_line, buffer) == 10, "status_line.buffer");
static_assert(offsetof(struct pgx_status_line, length) == 12, "status_line.length");
static_assert(offsetof(struct pgx_status_line, result) == 16, "status_line.result");
static_assert(offsetof(struct pgx_status_line, result2) == 24, "status_line.result2");
static_assert(offsetof(struct pgx_status_line, reserved) == 32, "status_line.reserved");
static_assert(sizeof(struct pgx_status_line) == 64, "status_line");
static_assert(offsetof(struct pgx_device_part, total_bytes) == 0, "device_part.total_bytes");
static_assert(offsetof(struct pgx_device_part, offset) == 4, "device_part.offset");
static_assert(sizeof(struct pgx_device_part) == 8, "device_part");
static_assert(offsetof(struct pgx_registers, identity) == 0, "identity");
static_assert(offsetof(struct pgx_registers, command) == 64, "command");
static_assert(offsetof(struct pgx_registers, status) == 128, "status");
static_assert(offsetof(struct pgx_registers, host_data) == 192, "host_data");
static_assert(offsetof(struct pgx_registers, svsm_data) == 256, "svsm_data");
static_assert(sizeof(struct pgx_registers) == PGX_REGISTER_PAGE_BYTES, "registers");

#endif
