package container

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/volume"
)

// RecordVersion is the layout of Record on disk. A daemon reads every version
// up to its own and refuses newer ones.
const RecordVersion = 1

// Record is a container.
type Record struct {
	Version int
	ID      string
	Name    string
	Created time.Time

	// Path and Args are the command after merging with the image.
	Path string
	Args []string

	// Config is merged with the image's; HostConfig is as asked, normalised.
	Config     *container.Config
	HostConfig *container.HostConfig
	Extra      api.CreateExtra `json:",omitzero"`

	Image Image
	// Endpoints are the networks asked for, by network name.
	Endpoints map[string]*network.EndpointSettings `json:",omitempty"`
	// Attached are the endpoints in use while it runs, by network name.
	Attached map[string]*network.EndpointSettings `json:",omitempty"`
	// DNS are the servers that its networks put into resolv.conf, if any.
	DNS []string `json:",omitempty"`
	// Ports are the published ports while it runs.
	Ports network.PortMap `json:",omitempty"`

	Mounts []volume.Point `json:",omitempty"`
	// Anonymous names the volumes that were made for it and go with it.
	Anonymous []string `json:",omitempty"`
	// UserNS is the container's own range of host ids; zero Size is the host's
	// user namespace.
	UserNS UserNS `json:",omitzero"`
	// Creator asked for it; policies hold for them.
	Creator caller.Caller `json:",omitzero"`
	// Ephemeral records live under the run root and vanish with the container.
	Ephemeral bool `json:",omitempty"`
	// SizeLimit bounds the writable layer, bytes; 0 is none.
	SizeLimit int64 `json:",omitempty"`
	// Pod is set where the container belongs to a pod of Kubernetes.
	Pod *Member `json:",omitempty"`

	State        State
	RestartCount int `json:",omitempty"`
}

// Image is what a container was made from.
type Image struct {
	ID       string
	Ref      string
	Manifest ocispec.Descriptor `json:",omitzero"`
	Platform ocispec.Platform
}

// UserNS maps Size ids of the container, from 0, to the host's from Host on.
type UserNS struct{ Host, Size uint32 }

// State is where a container is in its life.
type State struct {
	Status     container.ContainerState
	Pid        int       `json:",omitempty"`
	ExitCode   int       `json:",omitempty"`
	Error      string    `json:",omitempty"`
	OOMKilled  bool      `json:",omitempty"`
	StartedAt  time.Time `json:",omitzero"`
	FinishedAt time.Time `json:",omitzero"`
	// BootID is the host's boot in which it was last started: a record that says
	// "running" under another boot did not survive it.
	BootID string `json:",omitempty"`
	// ManualStop is set by stop and kill, and cleared by start.
	ManualStop bool `json:",omitempty"`
	// Health is nil without a health check.
	Health *container.Health `json:",omitempty"`
}

// Running reports whether a process is there.
func (s State) Running() bool {
	return s.Status == container.StateRunning || s.Status == container.StatePaused
}

// Clone returns a copy whose own fields can be replaced. What pointers and maps
// refer to is shared and must be replaced, never changed in place.
func (r *Record) Clone() *Record {
	c := *r
	return &c
}

// Encode gives the bytes to store.
func (r *Record) Encode() ([]byte, error) { return json.Marshal(r) }

// Decode reads what Encode wrote.
func Decode(b []byte) (*Record, error) {
	r := new(Record)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("cannot decode container record: %w", err)
	}
	switch {
	case r.Version < 1 || r.Version > RecordVersion:
		return nil, fmt.Errorf("cannot decode container record: version %d is not known to this build", r.Version)
	case !ValidID(r.ID):
		return nil, fmt.Errorf("cannot decode container record: invalid id %q", r.ID)
	case r.Config == nil || r.HostConfig == nil || !Known(r.State.Status):
		return nil, fmt.Errorf("cannot decode container record %s: it lacks a configuration or a known state", r.ID)
	}
	return r, nil
}

// ValidID reports whether id is a whole container id: 64 lower-case hex digits.
func ValidID(id string) bool {
	if len(id) != 64 {
		return false
	}
	for i := range len(id) {
		c := id[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
