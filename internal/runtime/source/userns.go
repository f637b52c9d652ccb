package source

import (
	"os"
	"runtime"
	"strconv"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// userNamespace makes a user namespace with the mappings, for idmapped mounts.
// A traced child of the shim's program stops before its first instruction; it
// is killed once the namespace is open.
func userNamespace(exe string, uids, gids []specs.LinuxIDMapping) (*os.File, error) {
	runtime.LockOSThread() // ptrace belongs to the thread
	defer runtime.UnlockOSThread()
	conv := func(m []specs.LinuxIDMapping) (out []syscall.SysProcIDMap) {
		for _, l := range m {
			out = append(out, syscall.SysProcIDMap{ContainerID: int(l.ContainerID), HostID: int(l.HostID), Size: int(l.Size)})
		}
		return out
	}
	pid, err := syscall.ForkExec(exe, []string{"servin-shim"}, &syscall.ProcAttr{
		Env:   []string{},
		Files: []uintptr{},
		Sys: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER, UidMappings: conv(uids), GidMappings: conv(gids),
			GidMappingsEnableSetgroups: true, Ptrace: true, Pdeathsig: syscall.SIGKILL,
		},
	})
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot make a user namespace for a mount: %w", err)
	}
	defer func() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		var ws syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(pid, &ws, 0, nil); err == syscall.EINTR || err == nil && !ws.Exited() && !ws.Signaled() {
				continue
			}
			return
		}
	}()
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/user")
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open a user namespace: %w", err)
	}
	return f, nil
}
