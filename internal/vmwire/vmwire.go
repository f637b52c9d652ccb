// Package vmwire is what the host and the inside of a virtual machine say to each
// other: the format of an image (image.json), the *port* (one virtio-serial port
// with a multiplexer on it), the *streams* on the port, and the messages of the
// control API. docs/flows/vm-image.md describes it. The builder of images, the
// host's side of VM mode and the guest's first process import it; it builds for
// every platform and imports nothing else of ours.
package vmwire

import "time"

// Names that host and guest agree on.
const (
	// Port is the name of the virtio-serial port.
	Port = "org.cloudos.engine"
	// VsockPort is the guest's vsock port that is the same, where a host has no named serial ports.
	VsockPort = 1024
	// SerialRoot and SerialData are the serial numbers of the virtio disks with
	// the read-only root and with what is kept.
	SerialRoot = "cloudos-root"
	SerialData = "cloudos-data"
	// Manifest is the name of the file that describes an image's folder.
	Manifest = "image.json"
	// FormatVersion is the version of image.json and of the port's protocol.
	FormatVersion = 1
)

// Image describes an image in the VM or netboot format: the content of image.json.
type Image struct {
	// FormatVersion is 1.
	FormatVersion int `json:"formatVersion"`
	// Format is vm, wsl, disk, iso or netboot.
	Format string `json:"format"`
	// Version is that of the programs inside.
	Version string `json:"version"`
	// Arch is amd64 or arm64.
	Arch string `json:"arch"`
	// Kernel is the kernel's version, as in uname -r; KernelPackage the package
	// that it is from, with its version.
	Kernel        string `json:"kernel"`
	KernelPackage string `json:"kernelPackage"`
	// CommandLine is what the kernel is to be started with; further words may
	// be added after it.
	CommandLine string `json:"commandLine"`
	// Config is the machine's configuration that the image carries, if any.
	Config string `json:"config,omitempty"`
	// Files are the files in the image's folder by role: kernel, initrd, root,
	// disk, iso.
	Files map[string]File `json:"files"`
	// Verity says how the root is checked while it is read: HASH,BLOCKS of the word
	// cloudos.verity; the tree of hashes is behind the root. Empty is not at all.
	Verity string `json:"verity,omitempty"`
}

// File is one file of an image.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// Format says what it holds where that varies: squashfs, raw, qcow2, or Packed.
	Format string `json:"format,omitempty"`
}

// Packed is the format of a kernel or a root that the host unpacks before the first start:
// packed with zstd.
const Packed = "raw+zstd"

// States of a machine.
const (
	StateStarting = "starting" // disks, network and engine are on their way
	StateReady    = "ready"    // the engine answers
	StateSafe     = "safe"     // something is wrong: Problems says what; the control API works
	StateStopping = "stopping"
)

// Status is the answer of GET /v1/status, and each line of GET /v1/events.
type Status struct {
	State    string `json:"state"`
	Version  string `json:"version"`
	Arch     string `json:"arch"`
	Kernel   string `json:"kernel"`
	BootID   string `json:"bootId"`
	Hostname string `json:"hostname"`
	// Problems say what is wrong, one sentence each with the fix where there is one.
	Problems []string `json:"problems,omitempty"`
	// ConfigSource is where the configuration came from: default, cmdline, disk,
	// nocloud, aws, gcp, azure, digitalocean, api.
	ConfigSource string      `json:"configSource"`
	Time         time.Time   `json:"time"`
	Uptime       float64     `json:"uptimeSeconds"`
	Engine       Engine      `json:"engine"`
	Interfaces   []Interface `json:"interfaces"`
	Memory       Memory      `json:"memory"`
	Data         Disk        `json:"data"`
	Mounts       []Mount     `json:"mounts"`
	// TimeSynchronized says whether the clock was set by the host or by NTP.
	TimeSynchronized bool `json:"timeSynchronized"`
	// Boot are the points in time of this boot, in seconds since the kernel
	// began: name to seconds.
	Boot map[string]float64 `json:"boot,omitempty"`
	// Trust says what the machine started from is protected by.
	Trust Trust `json:"trust"`
}

// Engine is the state of servind.
type Engine struct {
	Running  bool   `json:"running"`
	Ready    bool   `json:"ready"`
	PID      int    `json:"pid,omitempty"`
	Restarts int    `json:"restarts"`
	LastExit string `json:"lastExit,omitempty"`
}

// Interface is a network link of the machine.
type Interface struct {
	Name      string   `json:"name"`
	MAC       string   `json:"mac"`
	Up        bool     `json:"up"`
	Addresses []string `json:"addresses"`
	Gateway   string   `json:"gateway,omitempty"`
	DNS       []string `json:"dns,omitempty"`
	Problem   string   `json:"problem,omitempty"`
}

// Memory is of the guest, in bytes.
type Memory struct {
	Total     uint64 `json:"total"`
	Free      uint64 `json:"free"`
	Available uint64 `json:"available"`
	Cached    uint64 `json:"cached"`
	// Balloon says whether a balloon driver is there.
	Balloon bool `json:"balloon"`
	// Pressure is the share of the last 10 s in which something waited for memory, in percent.
	Pressure float64 `json:"pressure"`
}

// Disk is the data disk, in bytes.
type Disk struct {
	Device string `json:"device,omitempty"`
	// Kind is disk, or memory where there is no data disk and nothing is kept.
	Kind  string `json:"kind"`
	Disk  uint64 `json:"diskSize"`
	Total uint64 `json:"total"`
	Used  uint64 `json:"used"`
	Free  uint64 `json:"free"`
}

// Mount is a folder of the host inside the guest: POST /v1/mounts. Target is
// made if it is missing; mounting what is mounted already is no error.
type Mount struct {
	// Tag is virtiofs's tag.
	Tag string `json:"tag"`
	// Target is an absolute path in the guest, not below /proc, /sys, /dev, /run or /var.
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Clock sets the time: PUT /v1/clock.
type Clock struct {
	Time time.Time `json:"time"`
}

// ClockSet is its answer.
type ClockSet struct {
	// Moved is how far the clock was moved, in seconds.
	Moved float64 `json:"movedSeconds"`
}

// Shutdown stops the machine: POST /v1/shutdown. The answer comes before the
// machine stops; the port closes when it does.
type Shutdown struct {
	// Action is poweroff (default) or reboot.
	Action string `json:"action,omitempty"`
	// TimeoutSeconds bounds the containers' end (default 15).
	TimeoutSeconds int `json:"timeoutSeconds,omitempty"`
}

// Release gives memory back: POST /v1/memory/release. The answer is Memory.
type Release struct {
	// Caches drops clean caches, too.
	Caches bool `json:"caches,omitempty"`
}

// Sleep prepares for the machine being paused or saved: POST /v1/sleep writes
// what is unwritten, gives freed disk space and memory back. POST /v1/wake with a
// Clock ends it. The answer of both is Status.
type Sleep struct {
	// Memory gives memory back, too.
	Memory bool `json:"memory,omitempty"`
}

// Trimmed answers POST /v1/data/trim.
type Trimmed struct {
	Bytes uint64 `json:"bytes"`
}

// Changes tells the guest that files of the host changed, since virtiofs does not:
// POST /v1/changes. Watchers in containers then see an attribute change of each.
type Changes struct {
	Paths []string `json:"paths"`
}

// Changed is its answer: how many could be told.
type Changed struct {
	Told int `json:"told"`
}

// Busy answers GET /v1/busy: whether there is a reason not to sleep.
type Busy struct {
	// Containers that run; Streams open on the port besides the asking one.
	Containers int `json:"containers"`
	Streams    int `json:"streams"`
}

// Problem is the body of every answer that is not 2xx, as in the engine's API.
type Problem struct {
	Message string `json:"message"`
}
