package policy

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"go.yaml.in/yaml/v3"
)

// Rule is one rule.
type Rule struct {
	Name string `yaml:"name"`
	// Message tells who is refused what to do.
	Message string `yaml:"message"`
	When    *When  `yaml:"when"`

	Images         *Images        `yaml:"images"`
	Users          *Users         `yaml:"users"`
	Capabilities   *Choice        `yaml:"capabilities"`
	Privileged     Permit         `yaml:"privileged"`
	HostNamespaces *Choice        `yaml:"hostNamespaces"`
	Mounts         *Mounts        `yaml:"mounts"`
	Devices        *Choice        `yaml:"devices"`
	Networks       *NetworkChoice `yaml:"networks"`
	Sysctls        *Choice        `yaml:"sysctls"`
	// Unconfined lists what may go without its confinement: seccomp, apparmor,
	// label, systempaths.
	Unconfined    *Choice    `yaml:"unconfined"`
	Runtimes      *Choice    `yaml:"runtimes"`
	Resources     *Resources `yaml:"resources"`
	ReadOnlyRoot  Require    `yaml:"readOnlyRoot"`
	NoNewPrivs    Require    `yaml:"noNewPrivileges"`
	UserNamespace Require    `yaml:"userNamespace"`
	Exec          *ExecRule  `yaml:"exec"`
}

// When says which requests a rule is about; all that is given must hold.
type When struct {
	Images    []string          `yaml:"images"`
	NotImages []string          `yaml:"notImages"`
	UIDs      []uint32          `yaml:"uids"`
	NotUIDs   []uint32          `yaml:"notUids"`
	Subjects  []string          `yaml:"subjects"`
	Edges     []string          `yaml:"edges"`
	Labels    map[string]string `yaml:"labels"`
}

// Choice is a list of patterns: what none of allow matches, or one of deny does, is
// refused. No allow at all allows what is not denied.
type Choice struct {
	Allow *[]string `yaml:"allow"`
	Deny  []string  `yaml:"deny"`
}

// Images says which images may run.
type Images struct {
	Choice `yaml:",inline"`
	// Digest requires references by digest.
	Digest   Require  `yaml:"digest"`
	SignedBy []Signer `yaml:"signedBy"`
}

// Signer is one whose signature is accepted: a public key, or a certificate's
// identity and issuer (patterns).
type Signer struct {
	Key      string `yaml:"key"`
	Identity string `yaml:"identity"`
	Issuer   string `yaml:"issuer"`
	// TrustedRoot is the path of Sigstore's trusted_root.json: an identity is checked
	// with it, and a key's signatures must be in its log.
	TrustedRoot string `yaml:"trustedRoot"`
}

// Users says as whom processes may run.
type Users struct {
	// NonRoot refuses user 0 and, since only the image says who they are, users by
	// name.
	NonRoot bool `yaml:"nonRoot"`
	// Allow are ids, ranges (1000-1999) and names.
	Allow *[]string `yaml:"allow"`
}

// Mounts says what may be mounted.
type Mounts struct {
	// Types are bind, volume, tmpfs, image, and device for volumes that mount
	// something else (nfs, a disk).
	Types *[]string `yaml:"types"`
	// Binds are the host's directories that may be bound, with all below them.
	Binds *[]Bind `yaml:"binds"`
}

// Bind is a directory of the host.
type Bind struct {
	Source   string `yaml:"source"`
	ReadOnly bool   `yaml:"readOnly"`
}

// NetworkChoice says which networks may be used, by name.
type NetworkChoice struct {
	Choice `yaml:",inline"`
}

// Resources says what limits a container needs.
type Resources struct {
	Memory *Limit `yaml:"memory"`
	CPUs   *Limit `yaml:"cpus"`
	Pids   *Limit `yaml:"pids"`
}

// Limit is a limit that must be set, or may not exceed max.
type Limit struct {
	Required bool   `yaml:"required"`
	Max      string `yaml:"max"`
	max      float64
}

// ExecRule says what may be executed in running containers.
type ExecRule struct {
	Allowed    Permit `yaml:"allowed"`
	Privileged Permit `yaml:"privileged"`
	Users      *Users `yaml:"users"`
}

// Permit is "allow" or "deny".
type Permit string

// Require is "required" or nothing.
type Require string

// UnmarshalYAML reads allow, deny, or a boolean.
func (p *Permit) UnmarshalYAML(n *yaml.Node) error {
	switch n.Value {
	case "allow", "true":
		*p = "allow"
	case "deny", "false":
		*p = "deny"
	default:
		return fmt.Errorf("line %d: %q is neither allow nor deny", n.Line, n.Value)
	}
	return nil
}

// UnmarshalYAML reads required, optional, or a boolean.
func (r *Require) UnmarshalYAML(n *yaml.Node) error {
	switch n.Value {
	case "required", "true":
		*r = "required"
	case "optional", "false":
		*r = ""
	default:
		return fmt.Errorf("line %d: %q is neither required nor optional", n.Line, n.Value)
	}
	return nil
}

// compile checks a rule and prepares it.
func (r *Rule) compile() error {
	if r.Users != nil {
		if err := r.Users.check(); err != nil {
			return err
		}
	}
	if r.Exec != nil && r.Exec.Users != nil {
		if err := r.Exec.Users.check(); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		name  string
		of    *Choice
		known []string
	}{
		{"hostNamespaces", r.HostNamespaces, []string{"network", "pid", "ipc", "uts", "user", "cgroup"}},
		{"unconfined", r.Unconfined, []string{"seccomp", "apparmor", "label", "systempaths"}},
	} {
		if c.of == nil {
			continue
		}
		for _, v := range append(slices.Clone(c.of.Deny), allowed(c.of.Allow)...) {
			if v != "*" && !slices.Contains(c.known, v) {
				return fmt.Errorf("%s: %q is none of %s", c.name, v, strings.Join(c.known, ", "))
			}
		}
	}
	if r.Capabilities != nil {
		for i := range r.Capabilities.Deny {
			r.Capabilities.Deny[i] = capability(r.Capabilities.Deny[i])
		}
		for i := range allowed(r.Capabilities.Allow) {
			(*r.Capabilities.Allow)[i] = capability((*r.Capabilities.Allow)[i])
		}
	}
	if m := r.Mounts; m != nil {
		for _, t := range allowed(m.Types) {
			if !slices.Contains([]string{"bind", "volume", "tmpfs", "image", "device"}, t) {
				return fmt.Errorf("mounts.types: %q is none of bind, volume, tmpfs, image, device", t)
			}
		}
		if m.Binds != nil {
			for i, b := range *m.Binds {
				if !path.IsAbs(b.Source) {
					return fmt.Errorf("mounts.binds: %q is not an absolute path", b.Source)
				}
				(*m.Binds)[i].Source = path.Clean(b.Source)
			}
		}
	}
	if r.Images != nil {
		for _, s := range r.Images.SignedBy {
			if (s.Key == "") == (s.Identity == "") || (s.Identity == "") != (s.Issuer == "") {
				return errors.New("images.signedBy: each signer has either a key, or an identity and an issuer")
			}
			for _, p := range []string{s.Key, s.TrustedRoot} {
				if p != "" && !path.IsAbs(p) {
					return fmt.Errorf("images.signedBy: %q is not an absolute path", p)
				}
			}
		}
	}
	if l := r.Resources; l != nil {
		for name, x := range map[string]*Limit{"memory": l.Memory, "cpus": l.CPUs, "pids": l.Pids} {
			if x == nil || x.Max == "" {
				continue
			}
			var err error
			if name == "memory" {
				var n int64
				n, err = units.RAMInBytes(x.Max)
				x.max = float64(n)
			} else {
				x.max, err = strconv.ParseFloat(x.Max, 64)
			}
			if err != nil || !(x.max > 0) {
				return fmt.Errorf("resources.%s.max: %q is no amount", name, x.Max)
			}
		}
	}
	return nil
}

func allowed(l *[]string) []string {
	if l == nil {
		return nil
	}
	return *l
}
