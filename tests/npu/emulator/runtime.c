/* SPDX-License-Identifier: Apache-2.0
 *
 * A device of host memory behind the C interface of CANN, as far as torch_npu needs one.
 *
 *   FAKE_NPU_COUNT   devices (1)
 *   FAKE_NPU_SOC     Ascend910B4 or Ascend310P3 (Ascend910B4)
 *   FAKE_NPU_MEM     bytes of memory of each device (64 GiB)
 *   FAKE_NPU_TRACE   file that gets the name of every kernel that is launched; under torchrun each
 *                    rank has its own, with the rank behind a dot
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int R;
typedef void *P;

static long number(const char *name, long other) {
  const char *text = getenv(name);
  return text ? atol(text) : other;
}

/* ---- devices ---- */

enum { NO_CONTEXT = 107002, BAD_DEVICE = 107001, BAD_ARGUMENT = 107000, NO_MEMORY = 207001 };
static __thread int current = -1;

static int count(void) { return number("FAKE_NPU_COUNT", 1); }
R aclInit(const char *path) { return 0; }
R aclFinalize(void) { return 0; }
R aclrtGetDeviceCount(uint32_t *n) { *n = count(); return 0; }
R aclrtGetDevice(int32_t *d) { if (current < 0) return NO_CONTEXT; *d = current; return 0; }
R aclrtSetDevice(int32_t d) { if (d < 0 || d >= count()) return BAD_DEVICE; current = d; return 0; }
R aclrtResetDevice(int32_t d) { return 0; }
R aclrtGetCurrentContext(P *c) { *c = (P)(intptr_t)(current + 1); return current < 0 ? NO_CONTEXT : 0; }
R aclrtSetCurrentContext(P c) { current = (int)(intptr_t)c - 1; return 0; }
R aclrtGetPrimaryCtxState(int32_t d, uint32_t *flags, int32_t *active) { if (active) *active = 1; return 0; }
const char *aclrtGetSocName(void) { const char *s = getenv("FAKE_NPU_SOC"); return s ? s : "Ascend910B4"; }
const char *aclGetRecentErrMsg(void) { return "emulated CANN"; }
R aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 0; return 0; }
R aclGetCannAttribute(int a, int *v) { *v = 1; return 0; }
R aclGetDeviceCapability(uint32_t d, int i, int64_t *v) { *v = 0; return 0; }
R aclSetCompileopt(int o, const char *v) { return 0; }
size_t aclGetCompileoptSize(int o) { return 16; }
R aclGetCompileopt(int o, char *v, size_t n) { memset(v, 0, n); return 0; }
R aclopSetCompileFlag(int f) { return 0; }
static int64_t options[16];
R aclrtSetSysParamOpt(int o, int64_t v) { options[o & 15] = v; return 0; }
R aclrtGetSysParamOpt(int o, int64_t *v) { *v = options[o & 15]; return 0; }

/* Looked up by name at start, so they must exist; calls without effect. */
#define NOTHING(name) R name() { return 0; }
NOTHING(aclrtSetDeviceSatMode)
NOTHING(aclrtSetOpExecuteTimeOut)
NOTHING(aclrtSetOpWaitTimeout)
NOTHING(aclrtSetStreamAttribute)
NOTHING(aclrtSetStreamFailureMode)
NOTHING(aclrtSetStreamOverflowSwitch)
NOTHING(aclrtPeekAtLastError)
NOTHING(aclrtGetLastError)
NOTHING(aclrtCtxSetSysParamOpt)
NOTHING(aclrtGetDeviceUtilizationRate)
NOTHING(aclrtSynchronizeStream)
NOTHING(aclrtSynchronizeStreamWithTimeout)
NOTHING(aclrtSynchronizeDevice)
NOTHING(aclrtSynchronizeDeviceWithTimeout)
NOTHING(aclrtStreamWaitEvent)
NOTHING(aclrtResetEvent)
NOTHING(aclmdlRICaptureThreadExchangeMode)
NOTHING(AddTensorAddrToCachedList)

/* ---- memory: the size lies in a header before each block ---- */

enum { HEADER = 512 };
static size_t used;
static size_t total(void) { return number("FAKE_NPU_MEM", 64L << 30); }
static R take(P *out, size_t n) {
  P block;
  *out = 0;
  if (used + n > total() || posix_memalign(&block, HEADER, n + HEADER)) return NO_MEMORY;
  *(size_t *)block = n;
  used += n;
  *out = (char *)block + HEADER;
  return 0;
}
R aclrtMalloc(P *p, size_t n, int policy) { return take(p, n); }
R aclrtMallocAlign32(P *p, size_t n, int policy) { return take(p, n); }
R aclrtFree(P p) {
  if (p) {
    P block = (char *)p - HEADER;
    used -= *(size_t *)block;
    free(block);
  }
  return 0;
}
R aclrtMallocHost(P *p, size_t n) { return posix_memalign(p, 64, n ? n : 1) ? NO_MEMORY : 0; }
R aclrtFreeHost(P p) { free(p); return 0; }
R aclrtMemcpy(P d, size_t m, const void *s, size_t n, int k) { if (n > m) return BAD_ARGUMENT; memmove(d, s, n); return 0; }
R aclrtMemcpyAsync(P d, size_t m, const void *s, size_t n, int k, P stream) { return aclrtMemcpy(d, m, s, n, k); }
R aclrtMemset(P d, size_t m, int v, size_t n) { memset(d, v, n); return 0; }
R aclrtMemsetAsync(P d, size_t m, int v, size_t n, P s) { memset(d, v, n); return 0; }
R aclrtGetMemInfo(int attribute, size_t *f, size_t *t) { *t = total(); *f = total() - used; return 0; }
R aclrtPointerGetAttributes(const void *p, void *a) { return 100000; }
R aclrtHostRegister(P p, uint64_t n, int t, P *d) { if (d) *d = p; return 0; }
R aclrtHostUnregister(P p) { return 0; }

/* ---- streams and events: everything has happened already ---- */

static P handle(void) { return calloc(1, 64); }
R aclrtCreateStream(P *s) { *s = handle(); return 0; }
R aclrtCreateStreamWithConfig(P *s, uint32_t priority, uint32_t flag) { *s = handle(); return 0; }
R aclrtDestroyStream(P s) { free(s); return 0; }
R aclrtDestroyStreamForce(P s) { free(s); return 0; }
R aclrtStreamQuery(P s, int *state) { *state = 0; return 0; }
R aclrtStreamGetId(P s, int32_t *i) { *i = 0; return 0; }
R aclrtCreateEventWithFlag(P *e, uint32_t f) { *e = handle(); return 0; }
R aclrtCreateEventExWithFlag(P *e, uint32_t f) { *e = handle(); return 0; }
R aclrtDestroyEvent(P e) { free(e); return 0; }
R aclrtRecordEvent(P e, P s) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  *(double *)e = t.tv_sec * 1e3 + t.tv_nsec / 1e6;
  return 0;
}
R aclrtEventElapsedTime(float *ms, P a, P b) { *ms = *(double *)b - *(double *)a; return 0; }
R aclrtQueryEventStatus(P e, int *s) { *s = 1; return 0; }
R aclrtQueryEventWaitStatus(P e, int *s) { *s = 0; return 0; }

/* ---- the trace, and tensor descriptors ---- */

void fake_kernel(const char *name) {
  static FILE *file;
  const char *path = getenv("FAKE_NPU_TRACE");
  if (!path) return;
  if (!file) {
    char own[4096];
    const char *rank = getenv("RANK");
    snprintf(own, sizeof own, rank ? "%s.%s" : "%s", path, rank);
    file = fopen(own, "a");
  }
  if (!file) return;
  fprintf(file, "%s\n", name);
  fflush(file);
}

/* ---- graphs: device.py keeps what they do; a replay is one launch ---- */

static P captured; /* the graph that is being captured */
R aclmdlRICaptureBegin(P stream, int mode) { captured = calloc(1, 64); return 0; }
R aclmdlRICaptureGetInfo(P stream, int *state, P *model) {
  if (state) *state = captured != 0;
  if (model) *model = captured;
  return 0;
}
R aclmdlRICaptureEnd(P stream, P *model) { *model = captured; captured = 0; return 0; }
R aclmdlRICaptureTaskGrpBegin(P stream) { return captured ? 0 : BAD_ARGUMENT; }
R aclmdlRICaptureTaskGrpEnd(P stream, P *handle) { *handle = calloc(1, 64); return captured ? 0 : BAD_ARGUMENT; }
R aclmdlRICaptureTaskUpdateBegin(P stream, P handle) { return handle ? 0 : BAD_ARGUMENT; }
NOTHING(aclmdlRICaptureTaskUpdateEnd)
NOTHING(aclmdlRIDestroy)
NOTHING(aclDestroyAclOpExecutor)
NOTHING(aclSetAclOpExecutorRepeatable)
R aclmdlRIExecuteAsync(P model, P stream) { fake_kernel("graph"); return 0; }

enum { DIMS = 12 };
struct tensor { int dtype, format, dims; int64_t shape[DIMS]; };
P aclCreateTensor(const int64_t *shape, uint64_t dims, int dtype, const int64_t *strides, int64_t offset,
                  int format, const int64_t *storage, uint64_t storage_dims, P data) {
  struct tensor *t = calloc(1, sizeof *t);
  t->dtype = dtype;
  t->format = format;
  t->dims = dims < DIMS ? dims : DIMS;
  memcpy(t->shape, shape, t->dims * sizeof *shape);
  return t;
}
R aclDestroyTensor(P p) { free(p); return 0; }
R aclGetViewShape(struct tensor *t, int64_t **shape, uint64_t *n) {
  *n = t->dims;
  *shape = malloc(sizeof **shape * (t->dims + 1));
  memcpy(*shape, t->shape, sizeof **shape * t->dims);
  return 0;
}
static P box(void) { return calloc(1, 16); }
P aclCreateScalar(P v, int dtype) { return box(); }
P aclCreateIntArray(const int64_t *v, uint64_t n) { return box(); }
P aclCreateFloatArray(const float *v, uint64_t n) { return box(); }
P aclCreateBoolArray(const char *v, uint64_t n) { return box(); }
P aclCreateTensorList(const P *v, uint64_t n) { return box(); }
P aclCreateScalarList(const P *v, uint64_t n) { return box(); }
R aclDestroyScalar(P p) { free(p); return 0; }
R aclDestroyIntArray(P p) { free(p); return 0; }
R aclDestroyFloatArray(P p) { free(p); return 0; }
R aclDestroyBoolArray(P p) { free(p); return 0; }
R aclDestroyTensorList(P p) { free(p); return 0; }
R aclDestroyScalarList(P p) { free(p); return 0; }

/* ---- operators of the old kind, compiled while the program runs ---- */

static R compiled(const char *op) {
  char name[128];
  snprintf(name, sizeof name, "aclop%s", op);
  fake_kernel(name);
  return 0;
}
R aclopCompileAndExecute(const char *op) { return compiled(op); }
R aclopCompileAndExecuteV2(const char *op) { return compiled(op); }
P aclopCreateAttr(void) { return box(); }
void aclopDestroyAttr(P p) { free(p); }
P aclCreateTensorDesc(int dtype, int n, const int64_t *d, int format) { return aclCreateTensor(d, n, dtype, 0, 0, format, 0, 0, 0); }
void aclDestroyTensorDesc(P p) { aclDestroyTensor(p); }
int aclGetTensorDescType(struct tensor *t) { return t->dtype; }
int aclGetTensorDescFormat(struct tensor *t) { return t->format; }
size_t aclGetTensorDescNumDims(struct tensor *t) { return t->dims; }
R aclGetTensorDescDimV2(struct tensor *t, size_t i, int64_t *d) { *d = t->shape[i]; return 0; }
P aclCreateDataBuffer(P d, size_t n) { return box(); }
R aclDestroyDataBuffer(P p) { free(p); return 0; }

/* ---- ATB: objects with virtual functions. In order: two destructors, GetName, InferShape,
 * GetInputNum, GetOutputNum, Setup, Execute. An operation is made once and executed often. ---- */

struct object { P *table; const char *name; };
static long nothing() { return 0; }
static long execute(struct object *self) { fake_kernel(self->name); return 0; }
static P operation[16] = {nothing, nothing, nothing, nothing, nothing, nothing, nothing, execute};
static P context[16] = {nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing,
                        nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing};
R fake_operation(const char *name, P *out) {
  struct object *made = calloc(1, sizeof *made + 64);
  made->table = operation;
  made->name = name;
  *out = made;
  return 0;
}
R fake_context(P *out) {
  struct object *made = calloc(1, sizeof *made + 64);
  made->table = context;
  *out = made;
  return 0;
}
