package config

import (
	"bytes"
	"maps"
	"net/url"
	"strings"

	"github.com/docker/go-units"
	"go.yaml.in/yaml/v3"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// Install puts the system on a disk, where it is started from a medium or over the
// network.
type Install struct {
	Disk InstallDisk `yaml:"disk"`
	// Source is a release's address of http or https (default: the medium).
	Source string `yaml:"source"`
	// AllowUnsigned takes a release that no key signed which the medium trusts.
	AllowUnsigned bool `yaml:"allowUnsigned"`
	// Then is reboot (default) or poweroff.
	Then string `yaml:"then"`
}

// InstallDisk says which disk. Without any rule it is the only one that is empty.
type InstallDisk struct {
	// Path is the device, Serial its serial number.
	Path   string `yaml:"path"`
	Serial string `yaml:"serial"`
	// MinSize and MaxSize bound its size: 100GB, 1.5TB.
	MinSize string `yaml:"minSize"`
	MaxSize string `yaml:"maxSize"`
	// Pick is largest or smallest, of several that fit.
	Pick string `yaml:"pick"`
	// Wipe permits to overwrite what is on it.
	Wipe bool `yaml:"wipe"`
}

// Join says which cluster a node joins.
type Join struct {
	// Server is a master's address, HOST:PORT.
	Server string `yaml:"server"`
}

// Roles of a machine.
var roles = []string{"", "standalone", "master", "node"}

var devicePath = pattern.New(`^/dev/[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}$`)

// Bytes reads a size as disks are sold; "" is 0.
func Bytes(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := units.FromHumanSize(s)
	if err != nil || n <= 0 {
		return 0, fault.New(fault.Invalid, "%q is no size (100GB, 1.5TB)", s)
	}
	return uint64(n), nil
}

func (d *Document) checkInstall() error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }
	if d.Join != nil && d.Role != "node" {
		return bad("join is for the role node")
	}
	if d.Role == "node" && (d.Join == nil || !server.MatchString(d.Join.Server)) {
		return bad("the role node needs join.server, a master's HOST:PORT")
	}
	i := d.Install
	if i == nil {
		return nil
	}
	k := i.Disk
	least, err := Bytes(k.MinSize)
	if err != nil {
		return bad("install.disk.minSize: %w", err)
	}
	most, err := Bytes(k.MaxSize)
	if err != nil {
		return bad("install.disk.maxSize: %w", err)
	}
	switch {
	case k.Path != "" && !devicePath.MatchString(k.Path):
		return bad("install.disk.path: %q is no device (/dev/sda)", k.Path)
	case len(k.Serial) > 200 || strings.ContainsAny(k.Serial, "\n\x00"):
		return bad("install.disk.serial is no serial number")
	case k.Pick != "" && k.Pick != "largest" && k.Pick != "smallest":
		return bad("install.disk.pick: %q is neither largest nor smallest", k.Pick)
	case most > 0 && least > most:
		return bad("install.disk: minSize is more than maxSize")
	case k.Wipe && k.Path == "" && k.Serial == "" && k.Pick == "" && least == 0 && most == 0:
		return bad("install.disk.wipe needs the disk that it is about: path, serial, minSize, maxSize or pick")
	case i.Then != "" && i.Then != "reboot" && i.Then != "poweroff":
		return bad("install.then: %q is neither reboot nor poweroff", i.Then)
	}
	if i.Source != "" {
		if u, err := url.Parse(i.Source); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return bad("install.source: %q is no address of http or https", i.Source)
		}
	}
	return nil
}

// With is a document with fields of it set.
func With(b []byte, set map[string]any) ([]byte, error) {
	fields := map[string]any{}
	if err := yaml.Unmarshal(b, &fields); err != nil {
		return nil, fault.As(fault.Invalid, err)
	}
	maps.Copy(fields, set)
	return yaml.Marshal(fields)
}

// Installed is the document that an installed machine keeps: without its section install, and without
// a passphrase, which is never kept on the disk that it opens. Where the passphrase is all that opens the
// data, the section encryption has done its work.
func Installed(b []byte) ([]byte, error) {
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return nil, fault.As(fault.Invalid, err)
	}
	if len(n.Content) == 1 && n.Content[0].Kind == yaml.MappingNode {
		top := n.Content[0]
		drop(top, "install")
		if e := field(top, "encryption"); e != nil {
			if key := field(e, "key"); key == nil || key.Value != KeyTPM {
				drop(top, "encryption")
			}
			drop(e, "passphrase")
		}
	}
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(&n); err != nil {
		return nil, err
	}
	if err := e.Close(); err != nil {
		return nil, err
	}
	_, err := Parse(out.Bytes())
	return out.Bytes(), err
}

// field is a field of a mapping, or nil.
func field(m *yaml.Node, name string) *yaml.Node {
	if m.Kind == yaml.AliasNode {
		m = m.Alias
	}
	if m.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == name {
			return m.Content[i+1]
		}
	}
	return nil
}

// drop removes a field of a mapping.
func drop(m *yaml.Node, name string) {
	if m.Kind == yaml.AliasNode {
		m = m.Alias
	}
	for i := 0; m.Kind == yaml.MappingNode && i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == name {
			m.Content = append(m.Content[:i], m.Content[i+2:]...)
			return
		}
	}
}
