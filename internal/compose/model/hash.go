package model

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
)

// ServiceHash tells configurations of a service apart that need other
// containers. What concerns neither a container nor its image's content (how
// many there are, what comes first, how the image is got) is left out.
//
// It is the hash of Docker Compose 2.40, so that either takes the other's
// containers for its own: a digest of the service's JSON, whose fields stand in
// the order that compose-go had then.
func ServiceHash(s types.ServiceConfig) (string, error) {
	s.Build, s.PullPolicy, s.Scale, s.DependsOn, s.Profiles = nil, "", nil, nil, nil
	if s.Deploy != nil {
		d := *s.Deploy
		d.Replicas = nil
		s.Deploy = &d
	}
	b, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(b, &fields); err != nil {
		return "", err
	}
	if len(s.Volumes) > 0 {
		if fields["volumes"], err = json.Marshal(asThen(s.Volumes)); err != nil {
			return "", err
		}
	}
	var out bytes.Buffer
	put := func(name string) {
		v, ok := fields[name]
		if !ok {
			return
		}
		delete(fields, name)
		sep := byte(',')
		if out.Len() == 0 {
			sep = '{'
		}
		out.WriteByte(sep)
		out.WriteString(`"` + name + `":`)
		out.Write(v)
	}
	for _, name := range strings.Fields(fieldOrder) {
		put(name)
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) { // newer ones
		put(name)
	}
	out.WriteByte('}')
	return digest(out.Bytes()), nil
}

// fieldOrder is the order of a service's fields in compose-go 2.9.
const fieldOrder = `annotations attach develop blkio_config cap_add cap_drop cgroup_parent cgroup cpu_count cpu_percent cpu_period cpu_quota
cpu_rt_period cpu_rt_runtime cpus cpuset cpu_shares command configs container_name credential_spec deploy device_cgroup_rules devices
dns dns_opt dns_search dockerfile domainname entrypoint provider environment env_file expose extends external_links extra_hosts group_add gpus
hostname healthcheck image init ipc isolation labels label_file links logging log_driver log_opt mem_limit mem_reservation memswap_limit
mem_swappiness mac_address models net network_mode networks oom_kill_disable oom_score_adj pid pids_limit platform ports privileged
read_only restart runtime secrets security_opt shm_size stdin_open stop_grace_period stop_signal storage_opt sysctls tmpfs tty
ulimits use_api_socket user userns_mode uts volume_driver volumes volumes_from working_dir post_start pre_stop`

// volumeThen and bindThen are a volume as compose-go 2.9 wrote it: folders of
// the host that are made when missing said so.
type volumeThen struct {
	Type        string                     `json:"type,omitempty"`
	Source      string                     `json:"source,omitempty"`
	Target      string                     `json:"target,omitempty"`
	ReadOnly    bool                       `json:"read_only,omitempty"`
	Consistency string                     `json:"consistency,omitempty"`
	Bind        *bindThen                  `json:"bind,omitempty"`
	Volume      *types.ServiceVolumeVolume `json:"volume,omitempty"`
	Tmpfs       *types.ServiceVolumeTmpfs  `json:"tmpfs,omitempty"`
	Image       *types.ServiceVolumeImage  `json:"image,omitempty"`
}

type bindThen struct {
	SELinux        string `json:"selinux,omitempty"`
	Propagation    string `json:"propagation,omitempty"`
	CreateHostPath bool   `json:"create_host_path,omitempty"`
	Recursive      string `json:"recursive,omitempty"`
}

func asThen(list []types.ServiceVolumeConfig) []volumeThen {
	out := make([]volumeThen, len(list))
	for i, v := range list {
		out[i] = volumeThen{v.Type, v.Source, v.Target, v.ReadOnly, v.Consistency, nil, v.Volume, v.Tmpfs, v.Image}
		if b := v.Bind; b != nil {
			out[i].Bind = &bindThen{b.SELinux, b.Propagation, bool(b.CreateHostPath), b.Recursive}
		}
	}
	return out
}

// NetworkHash is the same for a network.
func NetworkHash(n types.NetworkConfig) (string, error) { return hash(&n) }

// VolumeHash is the same for a volume.
func VolumeHash(v types.VolumeConfig) (string, error) {
	if v.Driver == "" {
		v.Driver = "local"
	}
	return hash(v)
}

func hash(v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	return digest(b), nil
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// ConfigsHash is a digest of what a service's configs say that come from
// variables or the Compose file, "" if it has none. Secrets are left out: a label
// must tell nothing of them.
func ConfigsHash(p *types.Project, s *types.ServiceConfig) (string, error) {
	said := map[string]string{}
	for _, r := range s.Configs {
		c, ok := p.Configs[r.Source]
		if !ok || c.File != "" || bool(c.External) {
			continue
		}
		said[r.Source] = c.Content
		if c.Content == "" {
			said[r.Source] = p.Environment[c.Environment]
		}
	}
	if len(said) == 0 {
		return "", nil
	}
	return hash(said)
}
