package api

import (
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// States of the virtual machine.
const (
	VMOff      = "off"
	VMStarting = "starting"
	VMRunning  = "running"
	VMSleeping = "sleeping" // paused, its memory given back; the next command wakes it
	VMStopping = "stopping"
	VMSafe     = "safe" // it came up, but not its engine: Error says why
)

// VMStatus is what GET /v1/status of servin-vmd answers.
type VMStatus struct {
	State string
	// Error is why the last start failed or what is wrong now.
	Error string `json:",omitempty"`
	// Driver is qemu, vfkit, hyperv or wsl2; Accelerator what runs the guest's
	// instructions, with the reason where it is a slow one.
	Driver      string
	Accelerator string `json:",omitempty"`
	PID         int    `json:",omitempty"`
	// Version and Kernel are those of the image that runs; Image is its folder.
	Version string `json:",omitempty"`
	Kernel  string `json:",omitempty"`
	Image   string `json:",omitempty"`
	// Since is when the state was entered, IdleSince when something was last done.
	Since     time.Time
	IdleSince time.Time `json:",omitzero"`
	// Socket is where the engine's API is served.
	Socket string
	Config VMConfig
	// Pending are settings that take effect at the next start.
	Pending    []string   `json:",omitempty"`
	Containers int        `json:",omitempty"` // that run
	Memory     VMMemory   `json:",omitzero"`
	Disk       VMDisk     `json:",omitzero"`
	Ports      []VMPort   `json:",omitempty"`
	Shares     []VMShared `json:",omitempty"`
	// StartSeconds is how long the last start took.
	StartSeconds float64 `json:",omitempty"`
}

// VMMemory is in bytes: what the guest has and has free, and what the machine
// takes of the host.
type VMMemory struct {
	Guest, Available, Host uint64
}

// VMDisk is the data disk in bytes: its size, what is used in it, and what it
// takes of the host's disk.
type VMDisk struct {
	Size, Used, Host uint64
}

// VMPort is a published port of a container; Error says why it is not reachable on this host.
type VMPort struct {
	IP        string
	Port      uint16
	Protocol  string
	Container string
	Error     string `json:",omitempty"`
}

// VMShared is a host folder in the machine; Error says why it is not there.
type VMShared struct {
	VMShare
	Error string `json:",omitempty"`
}

// VMShare is a host folder that the machine sees under the same path.
type VMShare struct {
	Path     string `json:"path"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// VMConfig is the machine's configuration, kept in config.json of its folder.
type VMConfig struct {
	Version int `json:"version"` // 1
	CPUs    int `json:"cpus"`
	// MemoryMiB is the most that the guest may use; what it does not use the host keeps.
	MemoryMiB int `json:"memoryMiB"`
	// DiskGiB is the data disk's size. It grows, never shrinks, and takes what is used.
	DiskGiB int       `json:"diskGiB"`
	Shares  []VMShare `json:"shares"`
	// IdleSeconds without a container or a command put the machine to sleep, OffSeconds
	// more stop it; 0 is never.
	IdleSeconds int `json:"idleSeconds"`
	OffSeconds  int `json:"offSeconds"`
	// Image is the image's folder, empty for the one that was installed.
	Image string `json:"image,omitempty"`
	// Driver is empty for the platform's best.
	Driver string `json:"driver,omitempty"`
}

// VMChange is the body of PATCH /v1/config: what is set is changed.
type VMChange struct {
	CPUs        *int      `json:",omitempty"`
	MemoryMiB   *int      `json:",omitempty"`
	DiskGiB     *int      `json:",omitempty"`
	Shares      []VMShare `json:",omitempty"` // added, or changed in mode
	Unshare     []string  `json:",omitempty"`
	IdleSeconds *int      `json:",omitempty"`
	OffSeconds  *int      `json:",omitempty"`
	Image       *string   `json:",omitempty"`
	Driver      *string   `json:",omitempty"`
}

// VMChanged is its answer: the new configuration, what holds already, and what
// takes a restart.
type VMChanged struct {
	Config           VMConfig
	Applied, Pending []string
}

// VMProgress is a line of what POST /v1/start, stop, restart and reset stream.
// The last has Done set, or Error and Status.
type VMProgress struct {
	Step    string  `json:",omitempty"`
	Seconds float64 // since the beginning
	// Expected is how long it took the last time, 0 if unknown.
	Expected float64 `json:",omitempty"`
	Done     bool    `json:",omitempty"`
	Error    string  `json:",omitempty"`
	Status   int     `json:",omitempty"`
}

// VMLoss is what a reset destroys: GET /v1/loss.
type VMLoss struct {
	// Known is false where the machine could not be asked.
	Known                                 bool
	Containers, Images, Volumes, Networks int
	Running                               int
	DiskBytes                             uint64
	ContainerNames, VolumeNames           []string `json:",omitempty"` // the first 20 of each
}

// VMPlace is where VM mode of one user keeps things.
type VMPlace struct {
	// State holds the configuration, the data disk and records; Run the sockets.
	State, Run string
}

// Engine is the socket of the engine's API in the machine, Control that of
// servin-vmd itself.
func (p VMPlace) Engine() string  { return filepath.Join(p.Run, "vm.sock") }
func (p VMPlace) Control() string { return filepath.Join(p.Run, "vmd.sock") }

// FindVMPlace finds the user's: below SERVIN_VM_ROOT where that is set, else in
// the platform's folders for data and for sockets.
func FindVMPlace(getenv func(string) string, home string) VMPlace {
	if root := getenv("SERVIN_VM_ROOT"); filepath.IsAbs(root) {
		return VMPlace{State: filepath.Join(root, "state"), Run: filepath.Join(root, "run")}
	}
	switch runtime.GOOS {
	case "darwin":
		d := filepath.Join(home, "Library", "Application Support", "servin", "vm")
		return VMPlace{State: d, Run: filepath.Join(home, ".servin")}
	case "windows":
		d := filepath.Join(getenv("LOCALAPPDATA"), "servin", "vm")
		return VMPlace{State: d, Run: filepath.Join(d, "run")}
	}
	data := getenv("XDG_DATA_HOME")
	if !filepath.IsAbs(data) {
		data = filepath.Join(home, ".local", "share")
	}
	run := filepath.Join(home, ".servin") // where no login session keeps a folder
	if dir := getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		run = filepath.Join(dir, "servin", "vm")
	} else if dir := "/run/user/" + uidText(); os.Getuid() != 0 && isDir(dir) {
		run = filepath.Join(dir, "servin", "vm")
	}
	return VMPlace{State: filepath.Join(data, "servin", "vm"), Run: run}
}
