package runtime

import (
	"context"
	"os"
)

// Checkpointer is implemented by tasks whose processes can be written down. The
// images it makes start another task: StartRequest.Images.
type Checkpointer interface {
	// Checkpointable waits a moment for execs to end and tells why the task cannot
	// be written down now, if so. To be asked before it is paused.
	Checkpointable(ctx context.Context) error
	// Checkpoint writes the processes to images. They stay as they are: who wants
	// them to hold still before and after pauses the task. It is never broken off,
	// since what writes them may be inside of them: ctx is not looked at once it
	// has begun. fault.Conflict: what runs in it now cannot be written down, such as
	// an exec; fault.Unsupported: this container never can, or nothing can here.
	Checkpoint(ctx context.Context, req CheckpointRequest) (CheckpointResult, error)
	// Tracks tells whether a later request can build on a pre-dump here.
	Tracks() bool
	// Quiet cuts the task off from its network, or undoes that: what arrives for
	// connections that were written down must not be answered by their old owner.
	Quiet(ctx context.Context, on bool) error
}

// CheckpointRequest says where to and how.
type CheckpointRequest struct {
	// Dir is an empty directory for the images, Work one for the log.
	Dir, Work *os.File
	// Pre writes the memory alone, of a task that goes on: a later request with
	// Parent, the path of its images relative to Dir, writes what changed since.
	Pre    bool
	Parent string
	// Tracked: there will be, or was, a pre-dump.
	Tracked bool
	// TCPEstablished, FileLocks: write down what cannot be brought back anywhere.
	TCPEstablished, FileLocks bool
	// Held is inherited by the process that does the work: a lock on it shows
	// whether it is still at it.
	Held *os.File
}

// CheckpointResult is what a restore has to know beside the images.
type CheckpointResult struct {
	// Streams are the names of the standard streams within the images.
	Streams [3]string
	// Binds are the mounts that are the host's, by destination.
	Binds []string
	// Version is that of the program that wrote the images.
	Version int
}

// Images are what a task is brought back from.
type Images struct {
	// Dir holds them, Work, which has its absolute name, gets the log.
	Dir, Work *os.File
	CheckpointResult
	TCPEstablished, FileLocks bool
}
