package api

import (
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
)

// SecretKind tells secrets, whose values nobody can read back, from configs.
type SecretKind string

// The kinds.
const (
	KindSecret SecretKind = "secret"
	KindConfig SecretKind = "config"
)

// SecretSpec is the body of POST /servin/secrets and /servin/configs, and of
// POST …/{name}/update. Data travels as base64.
type SecretSpec struct {
	Name   string            `json:",omitempty"`
	Labels map[string]string `json:",omitempty"`
	Data   []byte            `json:",omitempty"`
}

// Secret describes a secret or config, without its value.
type Secret struct {
	ID        string
	Kind      SecretKind
	Name      string
	Labels    map[string]string `json:",omitempty"`
	CreatedAt time.Time
	UpdatedAt time.Time
	// Revision counts the values there have been.
	Revision uint64
	Size     int
	// UsedBy names the containers that have it.
	UsedBy []string `json:",omitempty"`
	// Data is the value of a config, when one was asked for by name.
	Data []byte `json:",omitempty"`
}

// SecretUpdated is the answer of an update: which running containers see the new
// value at once, and which only after they were started again.
type SecretUpdated struct {
	Secret
	Live    []string `json:",omitempty"`
	Restart []string `json:",omitempty"`
}

// SecretKey is the body of POST /servin/secrets/unlock and …/rotate-key.
type SecretKey struct {
	// Passphrase, "" for a key file.
	Passphrase string `json:",omitempty"`
}

// SecretRef gives a container a secret or config as a file.
type SecretRef struct {
	Kind SecretKind
	Name string
	// ID is set by the engine.
	ID string `json:",omitempty"`
	// Target is the file: an absolute path, or a name below /run/secrets. By
	// default a secret lies at /run/secrets/NAME and a config at /NAME.
	Target string `json:",omitempty"`
	UID    uint32 `json:",omitempty"`
	GID    uint32 `json:",omitempty"`
	// Mode of the file, 0444 by default.
	Mode *uint32 `json:",omitempty"`
}

// Labels that give secrets and configs through Docker's clients and Compose files:
// references as of --secret, separated by semicolons. Those of an image are not
// looked at.
const (
	LabelSecrets = "io.servin.secrets"
	LabelConfigs = "io.servin.configs"
)

// ParseSecretRef reads NAME[,target=PATH][,uid=N][,gid=N][,mode=OCTAL].
func ParseSecretRef(k SecretKind, s string) (SecretRef, error) {
	r := SecretRef{Kind: k}
	for i, f := range strings.Split(s, ",") {
		key, v, has := strings.Cut(f, "=")
		if !has {
			if i > 0 {
				return r, fmt.Errorf("cannot read %s %q: %q is not key=value", k, s, f)
			}
			key, v = "source", f
		}
		var err error
		switch key {
		case "source", "src", "name", "id":
			r.Name = v
		case "target", "dst", "destination":
			r.Target = v
		case "uid":
			r.UID, err = parseID(v)
		case "gid":
			r.GID, err = parseID(v)
		case "mode":
			var n uint64
			if n, err = strconv.ParseUint(v, 8, 32); err == nil && n > 0o777 {
				err = strconv.ErrRange
			}
			m := uint32(n)
			r.Mode = &m
		default:
			return r, fmt.Errorf("cannot read %s %q: key %q is none of source, target, uid, gid, mode", k, s, key)
		}
		if err != nil {
			return r, fmt.Errorf("cannot read %s %q: %s=%q is no number that fits", k, s, key, v)
		}
	}
	return r, r.Check()
}

// Check says what is wrong with a reference, if anything.
func (r SecretRef) Check() error {
	switch {
	case r.Kind != KindSecret && r.Kind != KindConfig:
		return fmt.Errorf("%q is neither secret nor config", r.Kind)
	case r.Name == "" || len(r.Name) > 256:
		return fmt.Errorf("a %s needs a name", r.Kind)
	case r.Mode != nil && *r.Mode > 0o777:
		return fmt.Errorf("%s %s: mode %o is more than 0777", r.Kind, r.Name, *r.Mode)
	case strings.ContainsRune(r.Target, 0) || len(r.Target) > 4096:
		return fmt.Errorf("%s %s: the target is no path", r.Kind, r.Name)
	case path.IsAbs(r.Target) && path.Clean(r.Target) == "/":
		return fmt.Errorf("%s %s: the target must be a file", r.Kind, r.Name)
	case !path.IsAbs(r.Target) && (strings.Contains(r.Target, "/") || r.Target == "." || r.Target == ".."):
		return fmt.Errorf("%s %s: the target must be an absolute path or a plain file name", r.Kind, r.Name)
	}
	return nil
}

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 {
		err = strconv.ErrRange
	}
	return uint32(n), err
}
