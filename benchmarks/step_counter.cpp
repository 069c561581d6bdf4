// Counts the instructions that a Python call runs inside one library: with the CPU's trap flag set, each of
// them raises SIGTRAP. This works in virtual machines, where hardware counters mostly do not, but costs
// microseconds a step, so the rest of the process runs at full speed: while it does, the library's code is
// not executable, and entering it faults.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>

extern "C" {
struct _object;
_object* PyObject_CallNoArgs(_object*);
void Py_DecRef(_object*);

struct Counts {
  uint64_t instructions, entries;
};
}

namespace {

constexpr long long TRAP_FLAG = 0x100;
uint64_t begin, size, last;
Counts counts;
struct sigaction before_trap, before_fault;

bool inside(uint64_t address) { return address - begin < size; }

void set_executable(bool executable) {
  mprotect(reinterpret_cast<void*>(begin), size, executable ? PROT_READ | PROT_EXEC : PROT_READ);
}

void on_fault(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint64_t next = registers[REG_RIP];
  if (!inside(next)) {
    sigaction(SIGSEGV, &before_fault, nullptr);  // somebody else's fault happens again, and is theirs
    return;
  }
  set_executable(true);
  registers[REG_EFL] |= TRAP_FLAG;
  last = next;
  ++counts.entries;
}

void on_step(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint64_t next = registers[REG_RIP];
  if (next == last) return;  // a string instruction repeats: a trap for each element
  ++counts.instructions;
  last = next;
  if (inside(next)) return;
  set_executable(false);
  registers[REG_EFL] &= ~TRAP_FLAG;
}

}  // namespace

// Calls `callable` without arguments; [text, text + bytes) is the library's code. 0, or -1 if the call
// raised.
extern "C" int frd_count_call(_object* callable, uint64_t text, uint64_t bytes, Counts* out) {
  begin = text, size = bytes, last = 0, counts = {};
  struct sigaction trap = {}, fault = {};
  trap.sa_sigaction = on_step, fault.sa_sigaction = on_fault;
  trap.sa_flags = fault.sa_flags = SA_SIGINFO;
  sigaction(SIGTRAP, &trap, &before_trap);
  sigaction(SIGSEGV, &fault, &before_fault);
  set_executable(false);
  _object* result = PyObject_CallNoArgs(callable);
  set_executable(true);
  sigaction(SIGSEGV, &before_fault, nullptr);
  sigaction(SIGTRAP, &before_trap, nullptr);
  *out = counts;
  if (result == nullptr) return -1;
  Py_DecRef(result);
  return 0;
}
