// Package runtime is the contract between the engine and whatever starts
// containers. Its native driver (package runtime/native) parks sandboxes, turns
// a runtime spec into a plan and hands it to servin-shim; the command driver
// (package runtime/command) runs any OCI runtime by name.
//
// Vocabulary. A *sandbox* is a set of namespaces, a cgroup and a monitor
// process with nothing running in it yet; it may be *parked* (made ahead of
// need). A *task* is a started container: its init process and the monitor
// that watches it. The monitor outlives the daemon; a new daemon takes a task
// over with Driver.Restore. The engine imports this package; drivers implement it.
package runtime

import (
	"context"
	"io"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Driver starts containers. Every method is safe for concurrent use.
type Driver interface {
	// Reserve allots the id of a container to be created: 64 hex digits. If a
	// parked sandbox fits the key it is held for that id for a few seconds, then
	// released (a later Start takes the cold path). It never blocks and never fails.
	Reserve(key SandboxKey) (id string)
	// Release gives up what Reserve holds for the id; unknown ids are ignored.
	Release(id string)
	// Start runs the container and returns when its process has been executed,
	// or fails with a *StartError, leaving nothing behind.
	Start(ctx context.Context, req StartRequest) (Task, error)
	// Restore takes over a task that a former daemon started, from its state
	// directory. It returns a task that may have exited already (Exited is then
	// closed). fault.NotFound: nothing is known of the id.
	Restore(ctx context.Context, id string) (Task, error)
	// Orphans lists the ids in the state directory, for Restore at start-up.
	Orphans() ([]string, error)
	// Run keeps the pool filled and tears sandboxes down, until ctx is done.
	Run(ctx context.Context) error
	// Drained waits until no teardown is pending and, if full, the pool is full.
	Drained(ctx context.Context, full bool) error
	// Close drops parked sandboxes. Running tasks go on.
	Close() error
}

// SandboxKey tells which parked sandboxes may serve a container.
type SandboxKey struct {
	// Network: "none" (own empty namespace), "bridge" (own namespace with one
	// prepared link), or "" for anything else, which is never parked.
	Network string
	// UserNS is "" for the host's user namespace; other mappings are not parked.
	UserNS string
	// CgroupParent is the parent cgroup path ("" is the default, "/servin").
	CgroupParent string
}

// Sandbox is what a network backend may touch before the process runs.
type Sandbox struct {
	ID    string
	NetNS *os.File // nil where the container has no network namespace of its own
	// Link is what Config.PrepareLink returned when the sandbox was parked, or nil.
	Link any
}

// StartRequest is everything one start needs.
type StartRequest struct {
	ID   string
	Key  SandboxKey
	Spec *specs.Spec
	// RootFS is a detached mount of the root file system (see package snapshot).
	// Start consumes it in every case. Drivers that need a path use Spec.Root.Path.
	RootFS *os.File
	// Network, if set, is called once the network namespace exists, before the
	// process runs. It may run at the same time as other preparation.
	Network func(ctx context.Context, sb Sandbox) error
	Stdio   Stdio
	Log     Log
	// Ephemeral: records of this container need not survive a power cut (--rm).
	Ephemeral bool
	// Init: run the built-in reaper as pid 1 (docker run --init).
	Init bool
	// StopAfterCreate holds the process before exec until Task.Release (CRI, OCI create).
	StopAfterCreate bool
	// Images, if set, are of the processes that run instead of Spec.Process: the
	// rest of the spec holds for them, and a driver that cannot tell that it does
	// refuses them. Only the native driver takes them.
	Images *Images
}

// Stdio says how the process's standard streams are made.
type Stdio struct {
	Terminal      bool
	Width, Height uint16
	// Stdin keeps standard input open (docker -i); otherwise it is /dev/null.
	Stdin bool
	// StdinOnce closes standard input when the first attached client leaves.
	StdinOnce bool
	// Attach, if set, is connected as the first client before the process
	// runs, so that no output is missed. The task's first Attach call returns
	// these streams, whatever options it is given.
	Attach *AttachOptions
}

// Log says where the monitor writes the output.
type Log struct {
	// Format: "json-file", "k8s-file", "none", or "pipe" (length-framed records to
	// Pipe, for drivers in the daemon such as journald and syslog).
	Format string
	// Path is the file to append to (created 0640).
	Path string
	// Pipe is where format "pipe" writes; Start duplicates it. A record is u32
	// length of the rest, u8 stream (1 stdout, 2 stderr), u8 partial, u16 0, u64
	// nanoseconds since 1970, data; little endian.
	Pipe *os.File
	// MaxSize in bytes rotates the file at that size, 0 never; MaxFiles is how
	// many files are kept (at least 1).
	MaxSize  int64
	MaxFiles int
	// NonBlocking drops and counts records when the disk stalls or is full
	// instead of stopping the container. BufferSize bytes, 0 is 1 MiB.
	NonBlocking bool
	BufferSize  int64
}

// StartError tells which step of a start failed.
type StartError struct {
	Step string // the operation's name, for instance "mount /data" or "exec"
	Err  error  // its errno, inspectable with errors.Is
}

func (e *StartError) Error() string { return "cannot " + e.Step + ": " + e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }

// Exit is how a process ended.
type Exit struct {
	Code      int // 128+n where signal n killed it
	Signal    int
	At        time.Time
	OOMKilled bool
	// Dropped counts log records lost in non-blocking mode.
	Dropped uint64
	// Error tells why the code is not the process's own: its monitor was killed.
	Error string
}

// Task is a started container.
type Task interface {
	ID() string
	Pid() int
	StartedAt() time.Time
	// Exited is closed once the process has ended and all of its output is in
	// the log; Exit is then valid.
	Exited() <-chan struct{}
	Exit() Exit
	// Release lets a process held by StopAfterCreate run.
	Release(ctx context.Context) error
	// Signal sends a signal to init, or with all to every process in the cgroup.
	Signal(ctx context.Context, sig int, all bool) error
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Attach connects a client to the streams. Output from the moment of the
	// call on is delivered; it ends with the process. The first call after a
	// start with Stdio.Attach returns the client connected then. That client makes
	// the container wait while it reads slowly; later ones are dropped.
	Attach(ctx context.Context, o AttachOptions) (Streams, error)
	Resize(ctx context.Context, width, height uint16) error
	Exec(ctx context.Context, req ExecRequest) (Exec, error)
	// Pids lists the host pids of the container's processes.
	Pids(ctx context.Context) ([]int, error)
	Stats(ctx context.Context) (*Stats, error)
	Update(ctx context.Context, r *specs.LinuxResources) error
	// Root opens the root directory as the process sees it (O_PATH); resolve
	// names under it with openat2 in-root semantics only.
	Root() (*os.File, error)
	NetNS() (*os.File, error)
	// ReopenLog makes the monitor open the log path again (after rotation by others).
	ReopenLog(ctx context.Context) error
	// Delete removes what is left of an ended task (mount namespace, cgroup,
	// state directory) and returns when its mounts are gone. Idempotent.
	Delete(ctx context.Context) error
}

// Warner is implemented by tasks that may not have got all that was asked for:
// limits that the host does not permit, controllers that the kernel lacks.
type Warner interface{ Warnings() []string }

// AttachOptions tells which streams a client wants.
type AttachOptions struct{ Stdin, Stdout, Stderr bool }

// Streams are the ends of an attached client. With a terminal, all output is on
// Stdout. Reading returns io.EOF once the process has ended and all was delivered.
type Streams struct {
	Stdin  io.WriteCloser // nil unless asked for; Close sends end of file
	Stdout io.Reader
	Stderr io.Reader // nil with a terminal
	Close  func() error
}

// ExecRequest runs another process in a started container.
type ExecRequest struct {
	ID      string
	Process *specs.Process
	Stdin   bool
	Detach  bool // no streams at all
}

// Exec is such a process.
type Exec interface {
	ID() string
	Pid() int
	Streams() Streams
	Exited() <-chan struct{}
	Exit() Exit
	Resize(ctx context.Context, width, height uint16) error
	Signal(ctx context.Context, sig int) error
}

// ExecKeeper is implemented by tasks whose execs go on when the daemon does not:
// a token, which is kept, finds one of them again. One that has ended meanwhile
// is fault.NotFound. An exec that was found again has no streams.
type ExecKeeper interface {
	ExecToken(x Exec) string
	RestoreExec(ctx context.Context, id, token string) (Exec, error)
}

// Stats is a reading of a container's resource use. Times are nanoseconds,
// sizes bytes.
type Stats struct {
	At                             time.Time
	CPUTotal, CPUUser, CPUSystem   uint64
	PerCPU                         []uint64
	Periods, ThrottledPeriods      uint64
	ThrottledTime                  uint64
	OnlineCPUs                     int
	SystemCPU                      uint64
	Memory, MemoryMax, MemoryLimit uint64
	MemoryFailures                 uint64
	MemoryStat                     map[string]uint64
	Pids, PidsLimit                uint64
	Blkio                          []BlkioEntry
	CgroupV2                       bool
}

// BlkioEntry is one device's counter.
type BlkioEntry struct {
	Table        string // "io_service_bytes_recursive", "io_serviced_recursive"
	Major, Minor uint64
	Op           string
	Value        uint64
}
