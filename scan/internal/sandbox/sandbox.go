// Package sandbox runs a stage of the scanner where it can do no harm: this same
// program again, as nobody, in an empty root of its own, without a network, without
// the right to start programs or open sockets, and with bounded memory. A stage
// reads its standard input, writes its standard output and a scratch directory, and
// sees at most one file of the host, read-only. The commands of servin-scan use it;
// the stages themselves call Enter first.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Limits bound a stage.
type Limits struct {
	Memory int64         // bytes
	Disk   int64         // bytes of scratch
	Time   time.Duration // of the wall clock
}

// Job is a stage to run.
type Job struct {
	Stage string
	Args  []string
	In    io.Reader
	Out   io.Writer
	// Database is a file that the stage finds at DatabasePath.
	Database string
	Limits   Limits
}

// Where a stage finds what it was given.
const (
	ScratchDir   = "/scratch"
	DatabaseDir  = "/db"
	DatabasePath = "/db/vulnerability.db"
	// rootName is where the stage's root is mounted, beside the scratch directory.
	rootName = "root"
)

// Exit codes of a stage; others are crashes.
const (
	exitFailed = 1
	exitMemory = 9
	exitDisk   = 10
	exitYes    = 20
)

// ErrYes is that a stage did its work and answers yes to what it was asked.
var ErrYes = errors.New("yes")

// Environment of a stage.
const (
	envStage    = "SERVIN_SCAN_STAGE"
	envMode     = "SERVIN_SCAN_MODE"
	envScratch  = "SERVIN_SCAN_SCRATCH"
	envDatabase = "SERVIN_SCAN_DATABASE"
	envMemory   = "SERVIN_SCAN_MEMORY"
	envDisk     = "SERVIN_SCAN_DISK"
)

// How far a stage is confined: modeFull, or limits alone where the system has no
// namespaces for us.
const (
	modeFull   = "full"
	modeLimits = "limits"
)

// maxComplaint bounds what a stage may say on standard error.
const maxComplaint = 16 << 10

// Stage is the stage that this process is to be, "" for none.
func Stage() string { return os.Getenv(envStage) }

// Run runs a stage to its end.
func Run(ctx context.Context, j Job) (err error) {
	if j.Limits.Time > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, j.Limits.Time, fault.New(fault.DeadlineExceeded, "it took longer than %s", j.Limits.Time))
		defer cancel()
	}
	base, err := os.MkdirTemp("", "servin-scan-")
	if err != nil {
		return fmt.Errorf("cannot make a scratch directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(base)) }()
	scratch := filepath.Join(base, "scratch")
	for _, d := range []string{scratch, filepath.Join(base, rootName)} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("cannot make a scratch directory: %w", err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, j.Args...)
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdin, cmd.Stdout = j.In, j.Out
	complaint := &tail{max: maxComplaint}
	cmd.Stderr = complaint
	mode := modeFull
	if os.Getenv(envMode) == modeLimits || runtime.GOOS != "linux" {
		mode = modeLimits
	}
	db := j.Database
	if db != "" {
		if db, err = filepath.Abs(db); err != nil {
			return err
		}
	}
	cmd.Env = []string{
		envStage + "=" + j.Stage, envMode + "=" + mode, envScratch + "=" + scratch, envDatabase + "=" + db,
		fmt.Sprintf("%s=%d", envMemory, j.Limits.Memory), fmt.Sprintf("%s=%d", envDisk, j.Limits.Disk),
		fmt.Sprintf("GOMEMLIMIT=%d", j.Limits.Memory*3/4), "GOTRACEBACK=none", "SERVIN_SCAN_DEBUG=" + os.Getenv("SERVIN_SCAN_DEBUG"),
	}
	if mode == modeFull {
		if err := confine(cmd, scratch); err != nil {
			return err
		}
	}
	// The parent's death is to be the child's: the kernel watches the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		if mode == modeFull {
			return fault.New(fault.Unsupported, "cannot confine the scanner: %w; allow user namespaces to ordinary users, run it as root, or set %s=%s to go without", err, envMode, modeLimits)
		}
		return fmt.Errorf("cannot start a stage: %w", err)
	}
	return j.verdict(ctx, cmd.Wait(), complaint.String())
}

// verdict says what the end of a stage means.
func (j Job) verdict(ctx context.Context, err error, said string) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var ee *exec.ExitError
	if !errors.As(err, &ee) {
		return err
	}
	if os.Getenv("SERVIN_SCAN_DEBUG") != "" {
		fmt.Fprintln(os.Stderr, said)
	}
	switch ee.ExitCode() {
	case exitYes:
		return ErrYes
	case exitFailed:
		if i := strings.LastIndexByte(strings.TrimSpace(said), '\n'); i >= 0 {
			said = said[i+1:]
		}
		return fault.New(fault.Invalid, "%s", printable(strings.TrimSpace(said)))
	case exitMemory:
		return fault.New(fault.Exhausted, "its content needs more than the %d MiB of memory that a scan may take: allow more with --memory", j.Limits.Memory>>20)
	case exitDisk:
		return fault.New(fault.Exhausted, "its content unpacks to more than the %d MiB that a scan may take: allow more with --max-size", j.Limits.Disk>>20)
	}
	// A Go program that the system gives no more memory ends with 2, and so does one that panics.
	return fault.New(fault.Invalid, "its content broke the scanner (%s): that is a defect of a parser, or the limit of %d MiB of memory was met at once", ee, j.Limits.Memory>>20)
}

// printable keeps what a hostile image may have put into a message from acting on
// a terminal.
func printable(s string) string {
	if s == "" {
		return "the stage failed without a word"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '.'
		}
		return r
	}, s)
}

// tail keeps the end of what is written.
type tail struct {
	b   []byte
	max int
}

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - t.max; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.b) }
