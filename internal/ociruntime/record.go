package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
)

const (
	recordName = "state.json"
	draftName  = "creating.json" // of a container that is no container yet
	gateName   = "exec.fifo"
	filterName = "seccomp.bpf"
)

// record is a container's state.json. Its upper part has the names and meanings
// that runc's has, since others read them; what only we need stands under "servin".
type record struct {
	ID             string            `json:"id"`
	InitPID        int               `json:"init_process_pid"`
	InitStart      uint64            `json:"init_process_start"`
	Created        time.Time         `json:"created"`
	Config         config            `json:"config"`
	Rootless       bool              `json:"rootless,omitempty"`
	CgroupPaths    map[string]string `json:"cgroup_paths,omitempty"`
	NamespacePaths map[string]string `json:"namespace_paths"`
	Descriptors    []string          `json:"external_descriptors,omitempty"`
	Servin         own               `json:"servin"`
}

// draft is what a record has before there is a process: as much as removing takes.
// Making text of a whole record costs as much as several steps of a start, and is
// done while others work.
type draft struct {
	ID     string `json:"id"`
	Config struct {
		Cgroups draftCgroup `json:"cgroups"`
	} `json:"config"`
	CgroupPaths map[string]string `json:"cgroup_paths,omitempty"`
}

// draftCgroup has fields of cgroups.Cgroup, by their names there.
type draftCgroup struct {
	Name        string `json:"name,omitempty"`
	Parent      string `json:"parent,omitempty"`
	Path        string `json:"path"`
	ScopePrefix string `json:"scope_prefix"`
	Systemd     bool
	Rootless    bool
}

// config is the part of runc's configuration that is read by others.
type config struct {
	Rootfs          string                     `json:"rootfs"`
	Readonlyfs      bool                       `json:"readonlyfs,omitempty"`
	Hostname        string                     `json:"hostname,omitempty"`
	Domainname      string                     `json:"domainname,omitempty"`
	Namespaces      []namespace                `json:"namespaces"`
	Cgroups         *cgroups.Cgroup            `json:"cgroups"`
	OOMScoreAdj     *int                       `json:"oom_score_adj,omitempty"`
	UIDMappings     []idMap                    `json:"uid_mappings,omitempty"`
	GIDMappings     []idMap                    `json:"gid_mappings,omitempty"`
	MaskPaths       []string                   `json:"mask_paths,omitempty"`
	ReadonlyPaths   []string                   `json:"readonly_paths,omitempty"`
	NoNewPrivileges bool                       `json:"no_new_privileges,omitempty"`
	Version         string                     `json:"version"`
	Labels          []string                   `json:"labels"`
	NoNewKeyring    bool                       `json:"no_new_keyring,omitempty"`
	RootlessEUID    bool                       `json:"rootless_euid,omitempty"`
	RootlessCgroups bool                       `json:"rootless_cgroups,omitempty"`
	NetDevices      map[string]netDeviceRecord `json:"netDevices,omitempty"`
	Capabilities    *specs.LinuxCapabilities   `json:"capabilities,omitempty"`
	AppArmor        string                     `json:"apparmor_profile,omitempty"`
	Label           string                     `json:"process_label,omitempty"`
}

type netDeviceRecord struct {
	Name string `json:"name,omitempty"`
}

type namespace struct {
	Type string `json:"type"`
	Path string `json:"path"`
}

type idMap struct {
	ContainerID int64 `json:"container_id"`
	HostID      int64 `json:"host_id"`
	Size        int64 `json:"size"`
}

// own is what later commands need and cannot read from the bundle, which may have
// changed or gone.
type own struct {
	Version     int               `json:"version"`
	Bundle      string            `json:"bundle"`
	Annotations map[string]string `json:"annotations,omitempty"`
	// Spec is config.json without what its process is given: raw, since only some
	// commands read it, and turning it into text again takes longer than a start may.
	Spec        json.RawMessage `json:"spec"`
	UserNS      bool            `json:"user_namespace,omitempty"`
	Filter      *filterRecord   `json:"seccomp,omitempty"`
	CgroupsPath string          `json:"cgroups_path,omitempty"`
}

// filterRecord tells how to load the compiled filter beside the record.
type filterRecord struct {
	Flags    uint32 `json:"flags"`
	Listener string `json:"listener,omitempty"`
	Metadata string `json:"metadata,omitempty"`
}

// container is one with its records.
type container struct {
	app *app
	id  string
	dir string
	rec record
	cg  cgroups.Manager
}

// load finds a container by its id.
func (a *app) load(id string) (*container, error) { return a.loadFrom(id, recordName) }

func (a *app) loadFrom(id, name string) (*container, error) {
	if err := validID(id); err != nil {
		return nil, err
	}
	c := &container{app: a, id: id, dir: filepath.Join(a.root, id)}
	b, err := os.ReadFile(filepath.Join(c.dir, name))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, errNotExist
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &c.rec); err != nil {
		return nil, fmt.Errorf("cannot read the records of container %s: %w", id, err)
	}
	if c.rec.Config.Cgroups == nil {
		c.rec.Config.Cgroups = &cgroups.Cgroup{}
	}
	if c.rec.Config.Cgroups.Resources == nil {
		c.rec.Config.Cgroups.Resources = &cgroups.Resources{}
	}
	if c.cg, err = openCgroup(c.rec.Config.Cgroups, c.rec.CgroupPaths); err != nil {
		return nil, err
	}
	return c, nil
}

// spec is what the container was created from, without arguments and environment.
func (c *container) spec() (*specs.Spec, error) {
	var s specs.Spec
	if err := json.Unmarshal(c.rec.Servin.Spec, &s); err != nil {
		return nil, fmt.Errorf("cannot read the records of container %s: %w", c.id, err)
	}
	if s.Process == nil {
		s.Process = &specs.Process{}
	}
	if s.Hooks == nil {
		s.Hooks = &specs.Hooks{}
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	return &s, nil
}

// save replaces the record in one step.
func (c *container) save() error { return c.saveAs(recordName, &c.rec) }

// saveDraft writes what somebody needs to know who finds the container half made.
func (c *container) saveDraft() error {
	cg := c.rec.Config.Cgroups
	d := draft{ID: c.id, CgroupPaths: c.rec.CgroupPaths}
	d.Config.Cgroups = draftCgroup{cg.Name, cg.Parent, cg.Path, cg.ScopePrefix, cg.Systemd, cg.Rootless}
	return c.saveAs(draftName, &d)
}

func (c *container) saveAs(name string, rec any) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(c.dir, name), b, 0o600, durable.Nothing); err != nil {
		return fmt.Errorf("cannot save the container's state: %w", err)
	}
	return nil
}

// lock keeps other invocations that change the container away until the
// descriptor is closed.
func (c *container) lock() (*os.File, error) {
	f, err := os.Open(c.dir)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, os.NewSyscallError("flock", err)
	}
	return f, nil
}

// alive tells whether the container's init still is the process that was started.
func (c *container) alive() bool { return processAlive(c.rec.InitPID, c.rec.InitStart) }

func processAlive(pid int, start uint64) bool {
	if pid <= 0 {
		return false
	}
	state, began, err := processStat(pid)
	return err == nil && state != 'Z' && state != 'X' && (start == 0 || began == start)
}

// processStat reads the state and the start time of a process.
func processStat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	// The name, in parentheses, may hold anything.
	s := string(b)
	i := strings.LastIndexByte(s, ')')
	f := strings.Fields(s[max(i, 0):])
	if i < 0 || len(f) < 21 {
		return 0, 0, fmt.Errorf("cannot parse /proc/%d/stat", pid)
	}
	start, err = strconv.ParseUint(f[20], 10, 64)
	return f[1][0], start, err
}

// Status of a container, as the runtime spec names them, and "paused".
const (
	statusCreated = "created"
	statusRunning = "running"
	statusPaused  = "paused"
	statusStopped = "stopped"
)

func (c *container) status() (string, error) {
	if c.cg != nil {
		st, err := c.cg.GetFreezerState()
		if err != nil {
			return "", fmt.Errorf("unable to get cgroup freezer state: %w", err)
		}
		if st == cgroups.Frozen {
			return statusPaused, nil
		}
	}
	if !c.alive() {
		return statusStopped, nil
	}
	if c.waiting() {
		return statusCreated, nil
	}
	return statusRunning, nil
}

// waiting tells whether init stands at its gate: it alone holds the pipe open.
func (c *container) waiting() bool {
	fd, err := c.openGate()
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func (c *container) openGate() (int, error) {
	return unix.Open(filepath.Join(c.dir, gateName), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
}

// ociState is what hooks and seccomp agents are told.
func (c *container) ociState(status specs.ContainerState, pid int) *specs.State {
	return &specs.State{Version: c.rec.Config.Version, ID: c.id, Status: status, Pid: pid, Bundle: c.rec.Servin.Bundle, Annotations: c.rec.Servin.Annotations}
}
