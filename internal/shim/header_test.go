package shim

import (
	"os"
	"regexp"
	"strconv"
	"testing"
	"unsafe"
)

// TestHeader compares this package's numbers with shim.h's.
func TestHeader(t *testing.T) {
	b, err := os.ReadFile("../../shim/shim.h")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]uint64{}
	for _, re := range []string{`(?m)^#define (\w+) (0x[0-9a-f]+|\d+)u?\b`, `\b([A-Z]+_[A-Z0-9_]+) = (\d+)\b`} {
		for _, m := range regexp.MustCompile(re).FindAllStringSubmatch(string(b), -1) {
			n, err := strconv.ParseUint(m[2], 0, 64)
			if err != nil {
				t.Fatal(err)
			}
			have[m[1]] = n
		}
	}
	for name, n := range map[string]uint64{
		"CTL_VERSION": ctlVersion, "SYNC_MAXFDS": maxFDs, "SYNC_INLINE": InlinePlan,
		"CTL_CLONE": uint64(ctlClone), "CTL_PLAN": uint64(ctlPlan), "CTL_MORE": uint64(ctlMore), "CTL_START": uint64(ctlStart),
		"CTL_RELEASE": uint64(ctlRelease), "CTL_EXEC": uint64(ctlExec), "CTL_SIGNAL": uint64(ctlSignal), "CTL_RESIZE": uint64(ctlResize),
		"CTL_ATTACH": uint64(ctlAttach), "CTL_REOPEN": uint64(ctlReopen), "CTL_STATE": uint64(ctlState), "CTL_QUIT": uint64(ctlQuit),
		"CTL_TERMINAL": uint64(ctlTerminal), "CTL_CLONED": uint64(ctlCloned), "CTL_DONE": uint64(ctlDone), "CTL_FAILED": uint64(ctlFailed),
		"CTL_STARTED": uint64(ctlStarted), "CTL_EXITED": uint64(ctlExited), "CTL_EXEC_EXITED": uint64(ctlExecExited),
		"CTL_STATE_IS": uint64(ctlStateIs), "CTL_FD": uint64(ctlFD),
		"CLONE_HAS_CGROUP": uint64(cloneHasCgroup), "CLONE_HAS_PIDNS": uint64(cloneHasPIDNS), "CLONE_HAS_USERNS": uint64(cloneHasUserNS),
		"START_STDIN": uint64(startStdin), "START_STDOUT": uint64(startStdout), "START_STDERR": uint64(startStderr),
		"START_LOGPIPE": uint64(startLogPipe), "START_TERMINAL": uint64(startTerminal), "START_STDIN_ONCE": uint64(startStdinOnce),
		"START_NONBLOCK": uint64(startNonBlock), "START_EPHEMERAL": uint64(startEphemeral), "START_HOLD": uint64(startHold),
		"START_PIDNS": uint64(startPIDNS), "START_COMMAND": uint64(startCommand), "START_HOLDFILE": uint64(startHoldFile),
		"LOG_NONE": uint64(LogNone), "LOG_JSON": uint64(LogJSON), "LOG_K8S": uint64(LogK8s), "LOG_PIPE": uint64(LogPipe),
		"EXEC_HAS_CGROUP": uint64(execHasCgroup), "EXEC_TERMINAL": uint64(execTerminal),
		"ATTACH_STDIN": uint64(attachStdin), "ATTACH_STDOUT": uint64(attachStdout), "ATTACH_STDERR": uint64(attachStderr),
		"ATTACH_LOSSLESS": uint64(attachLossless),
		"STATE_EMPTY":     uint64(Empty), "STATE_PARKED": uint64(Parked), "STATE_STARTING": uint64(Starting), "STATE_HELD": uint64(Held),
		"STATE_RUNNING": uint64(Running), "STATE_EXITED": uint64(Exited),
	} {
		if got, ok := have[name]; !ok || got != n {
			t.Errorf("%s is %d in shim.h, %d here", name, got, n)
		}
	}
	if unsafe.Sizeof(int(0)) < 4 {
		t.Error("lengths do not fit an int")
	}
}
