package unpack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// Argv0 is the name under which the program runs itself as Main.
const Argv0 = "servin-unpack"

// Descriptors of the child: the layer is on 0.
const (
	fdTarget = 3 + iota
	fdResult
	fdLowers
)

const maxResult = 64 << 20

// order is the child's second argument, report what it answers.
type order struct {
	Limits Limits
	Lowers int // descriptors given; -1 when lower directories are left out
	UserNS bool
}

type report struct {
	Result Result
	Kind   fault.Kind `json:",omitempty"`
	Error  string     `json:",omitempty"`
}

// Job is one layer to unpack.
type Job struct {
	Layer  io.Reader // an *os.File is handed to the child as it is
	Target *os.File  // an empty directory
	Lowers []string  // directories below, topmost first; nil leaves them out
	Limits Limits
	UserNS bool
}

// Run unpacks a layer in a child process. When ctx ends the child is killed.
func Run(ctx context.Context, j Job) (Result, error) {
	type outcome struct {
		res Result
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		// The child inherits what its starting thread may do, and dies with it.
		// The thread is never unlocked, so that it ends here, powerless as it is.
		runtime.LockOSThread()
		res, err := Result{}, dropThread()
		if err == nil {
			res, err = run(ctx, j)
		}
		done <- outcome{res, err}
	}()
	o := <-done
	return o.res, o.err
}

func run(ctx context.Context, j Job) (Result, error) {
	o := order{Limits: j.Limits, Lowers: -1, UserNS: j.UserNS}
	pr, pw, err := os.Pipe()
	if err != nil {
		return Result{}, fmt.Errorf("cannot make a pipe: %w", err)
	}
	defer pr.Close()
	defer pw.Close()
	extra := []*os.File{j.Target, pw}
	if j.Lowers != nil {
		o.Lowers = len(j.Lowers)
		for _, d := range j.Lowers {
			f, err := os.Open(d)
			if err != nil {
				return Result{}, fmt.Errorf("cannot open a layer below: %w", err)
			}
			defer f.Close()
			extra = append(extra, f)
		}
	}
	arg, err := json.Marshal(o)
	if err != nil {
		return Result{}, err
	}
	var stderr tail
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{Argv0, string(arg)}
	// Few threads and a small heap: several layers unpack at once.
	cmd.Env = []string{"GOMAXPROCS=2", "GOGC=50", "GOMEMLIMIT=24MiB", "GOTRACEBACK=none"}
	cmd.Stdin, cmd.Stderr, cmd.ExtraFiles = j.Layer, &stderr, extra
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return Result{}, fmt.Errorf("cannot start the unpacking process: %w", err)
	}
	pw.Close()
	var rep report
	decodeErr := json.NewDecoder(io.LimitReader(pr, maxResult)).Decode(&rep)
	waitErr := cmd.Wait()
	if ctx.Err() != nil {
		return Result{}, ctx.Err()
	}
	if decodeErr != nil {
		return Result{}, fmt.Errorf("cannot unpack: the unpacking process failed: %w %s", errors.Join(waitErr, decodeErr), stderr.b)
	}
	if rep.Error != "" {
		return Result{}, fault.New(rep.Kind, "%s", rep.Error)
	}
	return rep.Result, nil
}

// tail keeps the last bytes of what the child says on its way out.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > 1024 {
		t.b = t.b[len(t.b)-1024:]
	}
	return len(p), nil
}

// Main is the child: it reports on its descriptor and returns the exit code.
func Main(args []string) int {
	out := os.NewFile(fdResult, "result")
	rep := report{}
	res, err := work(args)
	if err != nil {
		rep.Kind, rep.Error = fault.Of(err), err.Error()
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			rep.Kind = fault.Exhausted
		}
	}
	rep.Result = res
	if err := json.NewEncoder(out).Encode(rep); err != nil {
		return 2
	}
	return 0
}

func work(args []string) (Result, error) {
	if len(args) != 2 {
		return Result{}, fault.New(fault.Invalid, "this program is not for running by hand")
	}
	var o order
	if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
		return Result{}, fmt.Errorf("cannot read the order: %w", err)
	}
	debug.SetMaxThreads(64)
	unix.CloseOnExec(fdTarget)
	unix.CloseOnExec(fdResult)
	var lowers []int
	if o.Lowers >= 0 {
		lowers = []int{}
		for i := range o.Lowers {
			lowers = append(lowers, fdLowers+i)
		}
	}
	unix.Umask(0)
	if err := confine(); err != nil {
		return Result{}, err
	}
	return Apply(context.Background(), fdTarget, lowers, os.Stdin, o.Limits, o.UserNS)
}

// keep are the capabilities of the child: those over files, and the one to
// confine itself with.
const keep = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH | 1<<unix.CAP_FOWNER |
	1<<unix.CAP_FSETID | 1<<unix.CAP_MKNOD | 1<<unix.CAP_SETFCAP | 1<<unix.CAP_SYS_CHROOT

// dropThread takes all other capabilities from the calling thread, for good: with
// no_new_privs, a program started from it gets no more, root's or not.
func dropThread() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot confine the unpacking process: no_new_privs: %w", err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&hdr, &have[0]); err != nil {
		return fmt.Errorf("cannot read capabilities: %w", err)
	}
	data := [2]unix.CapUserData{}
	for i := range data {
		mask := uint32(uint64(keep) >> (32 * i))
		data[i].Effective = have[i].Effective & mask
		data[i].Permitted = have[i].Permitted & mask
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("cannot confine the unpacking process: drop capabilities: %w", err)
	}
	return nil
}

// confine leaves the process the target directory and nothing else: no other
// file, no network, no other program.
func confine() error {
	if err := unix.Fchdir(fdTarget); err != nil {
		return fmt.Errorf("cannot enter the target: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("cannot confine the unpacking process: chroot: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("cannot enter the target: %w", err)
	}
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	return filterSyscalls()
}
