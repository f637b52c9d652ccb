package engine

import (
	"io"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/container"
)

// Filters are Docker's filters parameter: key to set of values.
type Filters = map[string]map[string]bool

// CreateRequest is a container create call. The engine owns what it points to.
type CreateRequest struct {
	Name       string
	Platform   string
	APIVersion string
	Config     *mcontainer.Config
	HostConfig *mcontainer.HostConfig
	Networking *network.NetworkingConfig
	// Extra carries what Docker's request lacks (header or /servin routes).
	Extra api.CreateExtra

	// member is set for a pod's container; idmapped and relabel are of PodContainer.
	member            *container.Member
	idmapped, relabel []string
}

// StartOptions of a start call.
type StartOptions struct {
	DetachKeys string
	// Checkpoint, if set, is what the container is brought back from; CheckpointDir
	// is where it lies, "" for the engine's own place.
	Checkpoint, CheckpointDir string
}

// ListOptions of GET /containers/json.
type ListOptions struct {
	All     bool
	Size    bool
	Limit   int
	Filters Filters
}

// CommitOptions of POST /commit.
type CommitOptions struct {
	Container, Ref, Comment, Author string
	Pause                           bool
	Changes                         []string
	Config                          *mcontainer.Config
}

// AttachRequest tells which streams a client wants.
type AttachRequest struct {
	Stdin, Stdout, Stderr bool
	Stream, Logs          bool
	DetachKeys            string
}

// Attached are the streams of a container or exec. With Terminal, output is on
// Stdout alone and unframed. Stdin.Close says that the client has no more input
// (whether that ends the process's input is the container's StdinOnce to say);
// Close ends the attachment, unblocks reads and writes, and may be called twice.
type Attached struct {
	// DetachKeys are those that an exec was created with, "" for the default.
	DetachKeys string
	Terminal   bool
	Stdin      io.WriteCloser
	Stdout     io.Reader
	Stderr     io.Reader
	Close      func() error
}

// RunningContainer is what ContainerRun returns; of ContainerExec the id is the
// exec's.
type RunningContainer struct {
	ID       string
	Warnings []string
	Streams  Attached
	Wait     <-chan mcontainer.WaitResponse
}

// LogOptions of GET /containers/{id}/logs.
type LogOptions struct {
	Stdout, Stderr, Follow, Timestamps, Details bool
	Since, Until                                time.Time
	Tail                                        int // -1 is all
}

// LogRecord is one record of a log.
type LogRecord struct {
	Time   time.Time
	Stream string // "stdout", "stderr"
	Line   []byte // with its newline, if it had one; valid until emit returns
	// Attrs are the details= of the record (labels and env that the log options
	// name), may be nil.
	Attrs map[string]string
}
