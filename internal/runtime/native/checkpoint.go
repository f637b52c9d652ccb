package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/criu"
	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var _ contract.Checkpointer = (*task)(nil)

// oldestCRIU is the first one that freezes cgroups of v2, too.
const oldestCRIU = 31400

// bindsOf are the destinations of mounts whose sources are the host's.
func bindsOf(spec *specs.Spec) []string {
	out := []string{}
	for i := range spec.Mounts {
		if m := &spec.Mounts[i]; isBind(m) {
			out = append(out, filepath.Clean("/"+m.Destination))
		}
	}
	return out
}

func isBind(m *specs.Mount) bool {
	if m.Type == "bind" {
		return true
	}
	for _, o := range m.Options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

// Checkpointable implements runtime.Checkpointer.
func (t *task) Checkpointable(ctx context.Context) error {
	switch {
	case t.d.limits.userNS:
		return fault.New(fault.Unsupported, "an ordinary user's engine cannot: CRIU needs root")
	case t.userNS:
		return fault.New(fault.Unsupported, "it has a user namespace of its own, whose ids are not those of another container")
	case !t.ownPID:
		return fault.New(fault.Unsupported, "it shares its process namespace with others")
	case t.binds == nil:
		return fault.New(fault.Unsupported, "it was started by an earlier build of the engine: start it again")
	case t.d.cg.Mode == cgroup.None:
		return fault.New(fault.Unsupported, "it has no cgroup")
	}
	// An exec is no child of the container's first process: CRIU would not find it.
	for end := time.Now().Add(2 * time.Second); ; {
		t.mu.Lock()
		n := len(t.execs)
		t.mu.Unlock()
		if n == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fault.New(fault.Conflict, "%d processes of exec run in it: end them first", n)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Checkpoint implements runtime.Checkpointer.
func (t *task) Checkpoint(ctx context.Context, req contract.CheckpointRequest) (contract.CheckpointResult, error) {
	var res contract.CheckpointResult
	if err := t.running("checkpoint"); err != nil {
		return res, err
	}
	if err := t.Checkpointable(ctx); err != nil {
		return res, err
	}
	version, err := criu.Version()
	if errors.Is(err, criu.ErrMissing) {
		return res, fault.New(fault.Unsupported, "%w", criu.ErrMissing)
	}
	if err != nil {
		// It has told its own log nothing yet: it does not even know the kernel.
		if uerr := criu.Usable(ctx); uerr != nil {
			err = uerr
		}
		return res, fault.New(fault.Unsupported, "%w", err)
	}
	if version < oldestCRIU {
		return res, fault.New(fault.Unsupported, "criu is version %d.%d, and 3.14 is the least that serves", version/10000, version/100%100)
	}
	res.Version, res.Binds = version, t.binds
	root, err := t.Root()
	if err != nil {
		return res, err
	}
	defer root.Close()
	o, err := t.dumpOptions(req, root, &res)
	if err != nil {
		return res, err
	}
	kind := criu.Dump
	if req.Pre {
		kind = criu.PreDump
	}
	var extra []*os.File
	if req.Held != nil {
		extra = append(extra, req.Held)
	}
	s, err := criu.Start([3]*os.File{}, extra)
	if err != nil {
		return res, fault.New(fault.Internal, "cannot run criu: %w", err)
	}
	var r criu.Message
	r.Int(1, kind)
	r.Bytes(2, *o)
	err = s.CarryOut(r, func(string, int, []int) error { return nil })
	cerr := s.Close()
	if err == nil && !req.Pre {
		err = cerr // after a pre-dump it waits for more, and does not mind
	}
	if err != nil {
		err = criuError("write down the processes", err, req.Work, dumpLog)
		if criu.Usable(ctx) != nil {
			err = fault.New(fault.Unsupported, "%w; \"criu check\" fails, too: this criu does not know this kernel", err)
		}
		return res, err
	}
	return res, nil
}

// Tracks implements runtime.Checkpointer.
func (t *task) Tracks() bool { return criu.TracksMemory() }

const (
	dumpLog    = "dump.log"
	restoreLog = "restore.log"
)

// criuError says why CRIU failed: its log knows.
func criuError(what string, err error, work *os.File, log string) error {
	if why := criu.Reason(fdDir(work), log); why != "" {
		return fault.New(fault.Internal, "cannot %s: criu says: %s", what, why)
	}
	return fault.New(fault.Internal, "cannot %s: %w", what, err)
}

func fdDir(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// dumpOptions tells CRIU of the container.
func (t *task) dumpOptions(req contract.CheckpointRequest, root *os.File, res *contract.CheckpointResult) (*criu.Message, error) {
	pid := t.Pid()
	var o criu.Message
	o.Int(criu.OptImagesDirFD, int(req.Dir.Fd()))
	o.Int(criu.OptWorkDirFD, int(req.Work.Fd()))
	o.Int(criu.OptLogLevel, 4)
	o.Str(criu.OptLogFile, dumpLog)
	o.Int(criu.OptPID, pid)
	o.Bool(criu.OptManageCgroups, true)
	o.Int(criu.OptManageCgroupMode, criu.CgroupsSoft)
	o.Bool(criu.OptOrphanPtsMaster, true)
	o.Bool(criu.OptLeaveRunning, true) // who ends it is the engine, once nothing can fail any more
	o.Bool(criu.OptTCPEstablished, req.TCPEstablished)
	o.Bool(criu.OptFileLocks, req.FileLocks)
	o.Bool(criu.OptExtUnixSk, false)
	o.Bool(criu.OptLinkRemap, true)
	if req.Parent != "" {
		o.Str(criu.OptParentImg, req.Parent)
	}
	if req.Tracked {
		o.Bool(criu.OptTrackMem, true)
	}
	if dir := t.freezer(); dir != "" {
		o.Str(criu.OptFreezeCgroup, dir)
	}
	// Its network is the engine's to bring back.
	var own, host unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &own); err != nil {
		return nil, fault.New(fault.Conflict, "cannot find its network namespace: %w", err)
	}
	if err := unix.Stat("/proc/self/ns/net", &host); err != nil {
		return nil, fault.New(fault.Internal, "cannot find the host's network namespace: %w", err)
	}
	if own.Ino != host.Ino {
		o.Str(criu.OptExternal, fmt.Sprintf("net[%d]:%s", own.Ino, criu.NamespaceKey("net")))
	}
	for _, b := range t.binds {
		o.Pair(criu.OptExtMnt, resolved(root, b), b)
	}
	for _, m := range t.masked {
		if fd, err := criu.OpenIn(int(root.Fd()), m); err == nil {
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR {
				o.Pair(criu.OptExtMnt, m, nullKey)
			}
			unix.Close(fd)
		}
	}
	for i := range res.Streams {
		name, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, i))
		if err == nil && streamName(name) {
			res.Streams[i] = name
		}
	}
	return &o, nil
}

// nullKey names the null device that covers what a container must not see.
const nullKey = "/dev/null"

// streamName tells names of pipes, which alone are given from outside.
func streamName(s string) bool {
	n, ok := strings.CutPrefix(s, "pipe:[")
	if !ok || !strings.HasSuffix(n, "]") || len(n) > 24 {
		return false
	}
	_, err := strconv.ParseUint(n[:len(n)-1], 10, 64)
	return err == nil
}

// freezer is the directory that CRIU freezes the container by.
func (t *task) freezer() string {
	p := t.group.Paths()
	if d, ok := p[""]; ok {
		return d
	}
	return p["freezer"]
}

// resolved is a path in the container as its mount table has it.
func resolved(root *os.File, path string) string {
	fd, err := criu.OpenIn(int(root.Fd()), path)
	if err != nil {
		return path
	}
	defer unix.Close(fd)
	base, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(root.Fd())))
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return path
	}
	if rel, ok := strings.CutPrefix(real, strings.TrimSuffix(base, "/")+"/"); ok {
		return "/" + rel
	}
	return path
}
