// Package config keeps what the command line remembers between calls: its
// configuration file, contexts (named engines) and registry credentials. Files
// live in one directory, ~/.config/servin by default; credentials are also found
// where Docker keeps them.
package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cloudos-io/cloudos/internal/durable"
)

// Dir is the configuration directory of the environment.
func Dir(getenv func(string) string) string {
	if d := getenv("SERVIN_CONFIG"); d != "" {
		return d
	}
	if d := getenv("XDG_CONFIG_HOME"); d != "" && filepath.IsAbs(d) {
		return filepath.Join(d, "servin")
	}
	if runtime.GOOS == "windows" {
		if d := getenv("APPDATA"); d != "" {
			return filepath.Join(d, "servin")
		}
	}
	return filepath.Join(Home(getenv), ".config", "servin")
}

// Home is the user's home directory, "" when unknown.
func Home(getenv func(string) string) string {
	if runtime.GOOS == "windows" {
		return getenv("USERPROFILE")
	}
	if h := getenv("HOME"); h != "" {
		return h
	}
	if os.Geteuid() == 0 {
		return "/root"
	}
	return ""
}

// File is config.json. Fields that we do not know are kept.
type File struct {
	CurrentContext string            `json:"currentContext,omitempty"`
	Mode           string            `json:"mode,omitempty"` // native, vm, or auto
	DetachKeys     string            `json:"detachKeys,omitempty"`
	PsFormat       string            `json:"psFormat,omitempty"`
	ImagesFormat   string            `json:"imagesFormat,omitempty"`
	VolumesFormat  string            `json:"volumesFormat,omitempty"`
	NetworksFormat string            `json:"networksFormat,omitempty"`
	StatsFormat    string            `json:"statsFormat,omitempty"`
	Headers        map[string]string `json:"HttpHeaders,omitempty"`
	Auths          map[string]Auth   `json:"auths,omitempty"`
	CredsStore     string            `json:"credsStore,omitempty"`
	CredHelpers    map[string]string `json:"credHelpers,omitempty"`

	path  string
	other map[string]json.RawMessage
}

// Auth is an entry of auths. Auth.Auth is user:password in base64.
type Auth struct {
	Auth          string `json:"auth,omitempty"`
	IdentityToken string `json:"identitytoken,omitempty"`
	RegistryToken string `json:"registrytoken,omitempty"`
}

// Load reads dir/config.json; a missing one is empty.
func Load(dir string) (*File, error) {
	f := &File{path: filepath.Join(dir, "config.json")}
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	if err := json.Unmarshal(b, f); err != nil {
		return nil, fmt.Errorf("cannot read the configuration %s: %w", f.path, err)
	}
	json.Unmarshal(b, &f.other)
	return f, nil
}

// Path is where the file lives.
func (f *File) Path() string { return f.path }

// Save writes the file, keeping fields that we do not know.
func (f *File) Save() error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	known := map[string]json.RawMessage{}
	if err := json.Unmarshal(b, &known); err != nil {
		return err
	}
	all := map[string]json.RawMessage{}
	for k, v := range f.other {
		if !ours(k) {
			all[k] = v
		}
	}
	for k, v := range known {
		all[k] = v
	}
	b, err = json.MarshalIndent(all, "", "\t")
	if err != nil {
		return err
	}
	return WriteFile(f.path, append(b, '\n'), 0o600)
}

func ours(key string) bool {
	switch key {
	case "currentContext", "mode", "detachKeys", "psFormat", "imagesFormat", "volumesFormat", "networksFormat", "statsFormat",
		"HttpHeaders", "auths", "credsStore", "credHelpers":
		return true
	}
	return false
}

// WriteFile replaces a file whole or not at all.
func WriteFile(path string, b []byte, mode fs.FileMode) error {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		path = p // keep a symlinked dot file a symlink
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := durable.WriteFile(path, b, mode, durable.Content); err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	_ = durable.SyncDir(filepath.Dir(path)) // as far as it can be had
	return nil
}

// ValidName reports whether a context can have the name.
func ValidName(s string) bool {
	if s == "" || len(s) > 128 || strings.HasPrefix(s, ".") || strings.HasPrefix(s, "-") {
		return false
	}
	for _, c := range s {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._+-", c)) {
			return false
		}
	}
	return true
}
