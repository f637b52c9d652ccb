// Package vm is the contract of VM mode: what a *driver* can do for one *machine*,
// the machine's *spec*, its configuration, and the record that lets a new
// servin-vmd find the machine that an earlier one started.
//
// A driver is one way to run a machine on this platform: qemu (everywhere), vfkit
// (macOS), hyperv and wsl2 (Windows). It starts a machine from a spec, or attaches
// to one from its record, and gives back a Machine. The machine outlives the
// process that started it: servin-vmd may be killed and replaced while
// containers run. A driver holds no state of its own beside what it puts into
// the record and into Spec.Run, and it never runs two machines on one data disk.
//
// What some hosts can and others cannot is an ability that a Machine may also
// have: Pauser, Balloon, Sharer, Resizer, Console. Callers ask with a type assertion and do without.
//
// Drivers live in folders below this one and pass the suite in vmtest. The host's
// side of VM mode (package host) decides when machines start, sleep and stop.
package vm

import (
	"context"
	"encoding/json"
	"net"
	"time"

	"github.com/cloudos-io/cloudos/api"
)

// Spec is a machine as a driver starts it.
type Spec struct {
	// Name distinguishes the machines of users and of tests.
	Name string
	CPUs int
	// Memory and Disk are in bytes.
	Memory, Disk int64
	Image        Image
	// Data is the data disk, which a driver makes if it is missing (sparse, Disk
	// long) and grows, never shrinks.
	Data string
	// Run is a folder of the machine's own for sockets and what does not outlive
	// it; State is kept.
	Run, State string
	Shares     []Share
}

// Share is a host folder that the machine gets by a tag.
type Share struct {
	api.VMShare
	Tag string
}

// Record is what Attach needs to find a machine again. It is written before a
// machine is started, so a driver has to find one of which only Spec's places are
// known, too.
type Record struct {
	Driver string          `json:"driver"`
	Spec   Spec            `json:"spec"`
	Detail json.RawMessage `json:"detail,omitempty"`
}

// Host is what a driver found out about the computer.
type Host struct {
	// Accelerator runs the guest's instructions: kvm, tcg, hvf, hyper-v.
	Accelerator string `json:"accelerator"`
	// Slow says why a better one is not used, with the fix.
	Slow string `json:"slow,omitempty"`
	// Version is of the program that runs machines.
	Version string `json:"version"`
}

// Driver runs machines.
type Driver interface {
	Name() string
	// Probe finds out what the host can do, or what is missing and how to get
	// it. It ends within seconds; a host that hangs is one that cannot.
	Probe(ctx context.Context, img Image, state string) (Host, error)
	// Start starts the machine and returns once its processes run and its port
	// can be dialled, long before the guest is up. Report tells what is done.
	Start(ctx context.Context, s Spec, h Host, report func(step string)) (Machine, error)
	// Attach finds a machine that runs, (nil, nil) if it does not. Remains of one
	// that was only half started are removed.
	Attach(ctx context.Context, r Record) (Machine, error)
}

// Machine is one that runs.
type Machine interface {
	// Record is what Attach will need.
	Record() Record
	// PID is the process to look at on the host, 0 if there is none.
	PID() int
	// Port dials the engine's port: package vmwire speaks over it. A new
	// connection ends the one before.
	Port(ctx context.Context) (net.Conn, error)
	// Kill ends the machine at once, as a power cut does. Orderly ends go
	// through the guest's control API.
	Kill(ctx context.Context) error
	// Wait returns when the machine has ended and everything of its is gone,
	// with what is known of the cause; or when ctx ends.
	Wait(ctx context.Context) error
	// Close lets go of the machine, which runs on.
	Close() error
}

// Pauser is a Machine that can stand still without its guest noticing.
type Pauser interface {
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	Paused(ctx context.Context) (bool, error)
}

// Balloon is a Machine whose guest can be left less memory while it runs.
type Balloon interface {
	// SetMemory leaves the guest so many bytes, of at most Spec.Memory.
	SetMemory(ctx context.Context, bytes int64) error
}

// Resizer is a Machine whose data disk can grow while it runs.
type Resizer interface {
	GrowDisk(ctx context.Context, bytes int64) error
}

// Sharer is a Machine to which shares can be added while it runs.
type Sharer interface {
	AddShare(ctx context.Context, s Share) error
}

// Console is a Machine with a serial line.
type Console interface {
	// Console dials it; a new connection ends the one before.
	Console(ctx context.Context) (net.Conn, error)
}

// Reaches is a Machine that says why shares are not in it, by path.
type Reaches interface {
	ShareProblems() map[string]string
}

// Placer is a Machine whose shares are elsewhere than on the host: its paths are of another kind.
type Placer interface {
	// Place says where the guest has a path of the host, and Origin the other way.
	Place(path string) (string, error)
	Origin(path string) (string, error)
}

// Keeper is a Driver that keeps a machine's data elsewhere than beside Spec.Data.
type Keeper interface {
	// Keeps says whether there are any. Of the spec it needs the places alone.
	Keeps(ctx context.Context, s Spec) (bool, error)
	// Destroy removes them; the machine does not run.
	Destroy(ctx context.Context, s Spec) error
}

// StopPatience is how long a guest has to stop in order.
const StopPatience = 30 * time.Second
