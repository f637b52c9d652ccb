package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/durable"
)

// recordVersion is the version of the records on disk that this build writes.
const recordVersion = 1

// netRecord is a network as it is kept on disk.
type netRecord struct {
	Version int
	network.Network
	// Link is the bridge device; Foreign means that it was there before us and
	// is not ours to delete.
	Link    string           `json:",omitempty"`
	Foreign bool             `json:",omitempty"`
	MTU     int              `json:",omitempty"`
	MAC     net.HardwareAddr `json:",omitempty"`
	Parent  string           `json:",omitempty"`
	// OwnParent: the parent link was made for the network and goes with it.
	OwnParent bool `json:",omitempty"`
	// Plugin: the driver is a plugin. Pools are those of a plugin that manages
	// addresses.
	Plugin bool         `json:",omitempty"`
	Pools  []poolRecord `json:",omitempty"`
	// Services are service addresses by lower-case alias.
	Services map[string]serviceRecord `json:",omitempty"`
}

// wired tells whether containers get a link, addresses and names on a network
// from us.
func (r *netRecord) wired() bool { return r.Driver == "bridge" || r.lan() || r.Plugin }

// endpoint is one container's place on one network, in memory and on disk.
type endpoint struct {
	ID            string
	NetworkID     string
	ContainerID   string
	ContainerName string
	Hostname      string                      `json:",omitempty"`
	Outer         string                      `json:",omitempty"`
	Index         int                         `json:",omitempty"`
	IfName        string                      `json:",omitempty"`
	MAC           net.HardwareAddr            `json:",omitempty"`
	IPv4          netip.Addr                  `json:",omitzero"`
	IPv6          netip.Addr                  `json:",omitzero"`
	Bits4         int                         `json:",omitempty"`
	Bits6         int                         `json:",omitempty"`
	IPAM          *network.EndpointIPAMConfig `json:",omitempty"`
	Aliases       []string                    `json:",omitempty"`
	Links         []string                    `json:",omitempty"`
	DNS           []netip.Addr                `json:",omitempty"`
	DriverOpts    map[string]string           `json:",omitempty"`
	GwPriority    int                         `json:",omitempty"`
	Ports         []published                 `json:",omitempty"`
	HasNS         bool                        `json:",omitempty"`
	Ephemeral     bool                        `json:",omitempty"`
	// SrcName is the name of a plugin's link in the host's namespace.
	SrcName string `json:",omitempty"`
	// Lease is the endpoint's, of networks with addresses by DHCP.
	Lease *leaseRecord `json:",omitempty"`
	// Shaped: a device beside the link limits what the container sends.
	Shaped bool `json:",omitempty"`
	// What CNI plugins or a DHCP server gave.
	Gateway4  netip.Addr `json:",omitzero"`
	Gateway6  netip.Addr `json:",omitzero"`
	Resolvers []string   `json:",omitempty"`
}

// published is one host port of an endpoint.
type published struct {
	Host      netip.Addr `json:",omitzero"`
	Proto     string
	HostPort  uint16 `json:",omitempty"`
	Container uint16
	To        netip.Addr
	Through   bool `json:",omitempty"`
	Routed    bool `json:",omitempty"`
	// Delegated to CNI plugins: only the reservation is ours, at the address Held.
	Delegated bool       `json:",omitempty"`
	Held      netip.Addr `json:",omitzero"`
}

// containerRecord is all of a container's endpoints: one file each.
type containerRecord struct {
	Version   int
	ID        string
	Endpoints []*endpoint
}

// disk keeps the records: networks and reservations for containers that do
// not run are durable; the endpoints of running containers die with the
// kernel and so need no sync.
type disk struct {
	networks, reserved, running string
}

func newDisk(root, runRoot string) (disk, error) {
	d := disk{filepath.Join(root, "networks"), filepath.Join(root, "endpoints"), filepath.Join(runRoot, "endpoints")}
	for _, p := range []string{d.networks, d.reserved, d.running} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			return d, fmt.Errorf("cannot make the directory of network records: %w", err)
		}
	}
	return d, nil
}

func (d disk) saveNetwork(r *netRecord) error {
	return writeRecord(d.networks, r.ID+".json", r, durable.Everything)
}

func (d disk) dropNetwork(id string) error {
	return removeRecord(d.networks, id+".json", true)
}

// saveContainer writes the endpoints of a container where they belong.
func (d disk) saveContainer(id string, eps []*endpoint) error {
	kept, run := containerRecord{Version: recordVersion, ID: id}, containerRecord{Version: recordVersion, ID: id}
	for _, e := range eps {
		if e.HasNS || e.Ephemeral {
			run.Endpoints = append(run.Endpoints, e)
		} else {
			kept.Endpoints = append(kept.Endpoints, e)
		}
	}
	name := id + ".json"
	if len(run.Endpoints) > 0 {
		if err := writeRecord(d.running, name, run, durable.Nothing); err != nil {
			return err
		}
	} else if err := removeRecord(d.running, name, false); err != nil {
		return err
	}
	if len(kept.Endpoints) > 0 {
		return writeRecord(d.reserved, name, kept, durable.Everything)
	}
	return removeRecord(d.reserved, name, true)
}

func writeRecord(dir, name string, v any, sync durable.Sync) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot encode a network record: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(dir, name), b, 0o600, sync); err != nil {
		return fmt.Errorf("cannot write a network record: %w", err)
	}
	return nil
}

func removeRecord(dir, name string, last bool) error {
	err := os.Remove(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && last {
		err = durable.SyncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("cannot remove a network record: %w", err)
	}
	return nil
}

// loadNetworks reads every network. One that cannot be read is named in the
// error list and left alone.
func (d disk) loadNetworks() (out []*netRecord, bad []error) {
	eachRecord(d.networks, func(path string, b []byte) error {
		r := &netRecord{}
		if err := json.Unmarshal(b, r); err != nil {
			return err
		}
		if r.Version > recordVersion {
			return fmt.Errorf("version %d is newer than this engine", r.Version)
		}
		if r.ID == "" || r.Name == "" || r.ID+".json" != filepath.Base(path) {
			return errors.New("it does not name its network")
		}
		out = append(out, r)
		return nil
	}, &bad)
	return out, bad
}

func (d disk) loadEndpoints() (out []*endpoint, bad []error) {
	for _, dir := range []string{d.running, d.reserved} {
		eachRecord(dir, func(path string, b []byte) error {
			var r containerRecord
			if err := json.Unmarshal(b, &r); err != nil {
				// A torn record of a running container: what it said will be
				// found out and cleaned up by Restore.
				return err
			}
			for _, e := range r.Endpoints {
				if e != nil && e.ContainerID == r.ID && e.NetworkID != "" {
					out = append(out, e)
				}
			}
			return nil
		}, &bad)
	}
	return out, bad
}

func eachRecord(dir string, fn func(path string, b []byte) error, bad *[]error) {
	es, err := os.ReadDir(dir)
	if err != nil {
		*bad = append(*bad, fmt.Errorf("cannot list network records: %w", err))
		return
	}
	for _, e := range es {
		p := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			// A write that never finished. One that is under way cannot be:
			// records are loaded before anybody writes.
			os.Remove(p)
			continue
		}
		b, err := os.ReadFile(p)
		if err == nil {
			err = fn(p, b)
		}
		if err != nil {
			*bad = append(*bad, fmt.Errorf("cannot read network record %s: %w", e.Name(), err))
		}
	}
}

func now() time.Time { return time.Now().UTC() }
