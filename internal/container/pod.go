package container

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"
)

// PodVersion is the layout of Pod on disk, as RecordVersion is of Record.
const PodVersion = 1

// NamespaceMode says whose namespace a pod or a container of a pod uses.
type NamespaceMode string

// The modes, as the CRI has them.
const (
	NamespacePod       NamespaceMode = "pod"       // the pod's, shared by its containers
	NamespaceContainer NamespaceMode = "container" // the container's own
	NamespaceHost      NamespaceMode = "host"
	NamespaceTarget    NamespaceMode = "target" // another container's
)

// Pod is a sandbox that containers share: namespaces, network, lifetime.
type Pod struct {
	Version int
	ID      string
	// Name, Namespace, UID and Attempt are Kubernetes'; together they are unique.
	Name, Namespace, UID string
	Attempt              uint32
	Created              time.Time
	Hostname             string `json:",omitempty"`

	// Ready: its namespaces and network stand. BootID is the boot they stood in.
	Ready  bool
	BootID string `json:",omitempty"`

	Network, IPC, PID NamespaceMode
	// UserNS is the pod's own range of host ids; zero Size is the host's user namespace.
	UserNS UserNS `json:",omitzero"`
	// CgroupParent is the cgroup under which its containers' are made, "" the engine's.
	CgroupParent string `json:",omitempty"`
	// Runtime is the name of the OCI runtime of its containers, "" the default.
	Runtime string            `json:",omitempty"`
	Ports   []PodPort         `json:",omitempty"`
	Sysctls map[string]string `json:",omitempty"`
	// DNS, Search and Options make resolv.conf; without any of them it is the host's.
	DNS, Search, Options []string `json:",omitempty"`

	Labels, Annotations map[string]string `json:",omitempty"`

	// IPs are its addresses, and Detail what its network's backend says of it.
	IPs    []netip.Addr    `json:",omitempty"`
	Detail json.RawMessage `json:",omitempty"`

	// Edge is what the edge that made the pod wants to remember; opaque.
	Edge []byte `json:",omitempty"`
}

// PodPort is a port published on the host.
type PodPort struct {
	Protocol                string
	HostIP                  netip.Addr `json:",omitzero"`
	HostPort, ContainerPort uint16
}

// Member is what a pod's container has beyond Docker's vocabulary.
type Member struct {
	// Pod is the id of its pod, Name its name there.
	Pod  string
	Name string `json:",omitempty"`
	// Log is where its output goes, an absolute path, "" nowhere.
	Log string `json:",omitempty"`
	// PID says whose processes it sees; Target is the container of NamespaceTarget.
	PID    NamespaceMode
	Target string `json:",omitempty"`
	// Strict leaves out the groups that the image's /etc/group gives the user.
	Strict bool     `json:",omitempty"`
	Groups []uint32 `json:",omitempty"`
	// Ambient are capabilities that also go to the ambient and inheritable sets.
	Ambient []string `json:",omitempty"`
	// Hugepages limits by page size ("2MB"), bytes. Unified are cgroup v2 settings.
	Hugepages map[string]uint64 `json:",omitempty"`
	Unified   map[string]string `json:",omitempty"`
	// User is who its first process ran as, once it was started.
	User *MemberUser `json:",omitempty"`
	// Edge is as in Pod.
	Edge []byte `json:",omitempty"`
}

// MemberUser is a process's identity inside its container.
type MemberUser struct {
	UID, GID uint32
	Groups   []uint32
}

// Clone is as of Record.
func (p *Pod) Clone() *Pod {
	c := *p
	return &c
}

// Encode gives the bytes to store.
func (p *Pod) Encode() ([]byte, error) { return json.Marshal(p) }

// DecodePod reads what Encode wrote.
func DecodePod(b []byte) (*Pod, error) {
	p := new(Pod)
	if err := json.Unmarshal(b, p); err != nil {
		return nil, fmt.Errorf("cannot decode pod record: %w", err)
	}
	switch {
	case p.Version < 1 || p.Version > PodVersion:
		return nil, fmt.Errorf("cannot decode pod record: version %d is not known to this build", p.Version)
	case !ValidID(p.ID):
		return nil, fmt.Errorf("cannot decode pod record: invalid id %q", p.ID)
	}
	for _, m := range []NamespaceMode{p.Network, p.IPC, p.PID} {
		switch m {
		case NamespacePod, NamespaceContainer, NamespaceHost:
		default:
			return nil, fmt.Errorf("cannot decode pod record %s: unknown namespace mode %q", p.ID, m)
		}
	}
	return p, nil
}
