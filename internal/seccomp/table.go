package seccomp

import (
	_ "embed"
	"strconv"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

//go:embed syscalls.txt
var syscallsText string

// arch is one way into the kernel.
type arch struct {
	oci    specs.Arch
	audit  uint32 // AUDIT_ARCH_*
	column int    // of syscalls.txt
	wide   bool   // arguments of 64 bits
	x32    bool   // numbers have bit 30 set
	mux    bool   // old calls by way of socketcall and ipc
}

// families are the ways into a kernel by GOARCH, the native one first. What a
// kernel cannot be entered by needs no rules.
func families() map[string][]arch {
	return map[string][]arch{
		"amd64": {
			{oci: specs.ArchX86_64, audit: 0xc000003e, column: 0, wide: true},
			{oci: specs.ArchX32, audit: 0xc000003e, column: 2, x32: true},
			{oci: specs.ArchX86, audit: 0x40000003, column: 1, mux: true},
		},
		"arm64": {
			{oci: specs.ArchAARCH64, audit: 0xc00000b7, column: 3, wide: true},
			{oci: specs.ArchARM, audit: 0x40000028, column: 4},
		},
		"riscv64": {{oci: specs.ArchRISCV64, audit: 0xc00000f3, column: 5, wide: true}},
	}
}

const columns = 6

// table is the parsed syscalls.txt: number by name, -1 for none.
type table struct {
	numbers map[string][columns]int32
}

var syscallTable = sync.OnceValue(func() *table { return parseTable(syscallsText) })

func parseTable(text string) *table {
	t := &table{numbers: make(map[string][columns]int32, 512)}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != columns+1 || strings.HasPrefix(line, "#") {
			continue
		}
		var row [columns]int32
		for i := range row {
			n, err := strconv.ParseInt(f[i+1], 10, 32)
			if err != nil {
				n = -1
			}
			row[i] = int32(n)
		}
		t.numbers[f[0]] = row
	}
	return t
}

// number is the call's number on the architecture, with x32's bit.
func (t *table) number(name string, a arch) (uint32, bool) {
	row, ok := t.numbers[name]
	if !ok || row[a.column] < 0 {
		return 0, false
	}
	n := uint32(row[a.column])
	if a.x32 {
		n |= x32Bit
	}
	return n, true
}

// multiplexed tells by which call of old, and with which first argument, a call
// can also be made on x86: socketcall (102) and ipc (117).
func multiplexed(name string) (call, sub uint32, ok bool) {
	for i, n := range []string{"socket", "bind", "connect", "listen", "accept", "getsockname", "getpeername", "socketpair", "send",
		"recv", "sendto", "recvfrom", "shutdown", "setsockopt", "getsockopt", "sendmsg", "recvmsg", "accept4", "recvmmsg", "sendmmsg"} {
		if n == name {
			return 102, uint32(i + 1), true
		}
	}
	for i, n := range []string{"semop", "semget", "semctl", "semtimedop", "", "", "", "", "", "", "msgsnd", "msgrcv", "msgget", "msgctl",
		"", "", "", "", "", "", "shmat", "shmdt", "shmget", "shmctl"} {
		if n == name {
			return 117, uint32(i + 1), true
		}
	}
	return 0, 0, false
}
