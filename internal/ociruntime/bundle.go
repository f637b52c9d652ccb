package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const (
	configName = "config.json"
	maxConfig  = 32 << 20
)

// readSpec reads the config.json of the bundle that is the working directory.
func readSpec(name string) (*specs.Spec, error) {
	spec, _, err := readRawSpec(name)
	return spec, err
}

// readRawSpec gives the text, too.
func readRawSpec(name string) (*specs.Spec, []byte, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("JSON specification file %s not found", name)
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if st.Size() > maxConfig {
		return nil, nil, fmt.Errorf("%s of %d bytes is too long", name, st.Size())
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, nil, fmt.Errorf("cannot read %s: %w", name, err)
	}
	if err := checkProcess(spec.Process); err != nil {
		return nil, nil, err
	}
	return &spec, b, nil
}

// recordable is the text of a spec less the process's arguments and environment and
// the seccomp profile: what records may hold.
func recordable(spec *specs.Spec, doc []byte) (json.RawMessage, error) {
	raw, err := without(doc, "process", "args", "env")
	if err == nil && spec.Linux != nil && spec.Linux.Seccomp != nil {
		raw, err = without(raw, "linux", "seccomp")
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", configName, err)
	}
	return raw, nil
}

// without leaves fields of one object out of a document.
func without(doc []byte, object string, fields ...string) ([]byte, error) {
	var top, inner map[string]json.RawMessage
	if err := json.Unmarshal(doc, &top); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(top[object], &inner); err != nil {
		return nil, err
	}
	for _, f := range fields {
		delete(inner, f)
	}
	b, err := json.Marshal(inner)
	if err != nil {
		return nil, err
	}
	top[object] = b
	return json.Marshal(top)
}

func checkProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return errors.New("process property must not be empty")
	case p.Cwd == "":
		//lint:ignore ST1005 as callers know it
		return errors.New("Cwd property must not be empty")
	case !filepath.IsAbs(p.Cwd):
		//lint:ignore ST1005 as callers know it
		return errors.New("Cwd must be an absolute path")
	case len(p.Args) == 0:
		return errors.New("args must not be empty")
	case p.SelinuxLabel != "" && !hasSELinux():
		return errors.New("selinux label is specified in config, but selinux is disabled or not supported")
	}
	return nil
}

func hasSELinux() bool {
	_, err := os.Stat("/sys/fs/selinux/enforce")
	return err == nil
}

func hasAppArmor() bool {
	b, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return strings.HasPrefix(string(b), "Y")
}

func findNamespace(spec *specs.Spec, t specs.LinuxNamespaceType) (path string, ok bool) {
	for _, n := range spec.Linux.Namespaces {
		if n.Type == t {
			return n.Path, true
		}
	}
	return "", false
}

// check refuses what cannot be; what the plan's compiler checks is left to it.
func (a *app) check(spec *specs.Spec) error {
	if spec.Linux == nil {
		return errors.New("the spec has no linux section: only Linux containers can be run")
	}
	if spec.VM != nil && spec.VM.Kernel.Path != "" {
		return errors.New("the spec asks for a virtual machine, which this runtime does not make")
	}
	if v, _, _ := strings.Cut(spec.Version, "."); v != "1" && spec.Version != "" {
		return fmt.Errorf("unsupported OCI spec version %q (1.x is supported)", spec.Version)
	}
	if spec.Root == nil || spec.Root.Path == "" {
		return errors.New("root path must not be empty")
	}
	root, err := filepath.Abs(spec.Root.Path)
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return fmt.Errorf("invalid rootfs: %w", err)
	}
	if real != filepath.Clean(root) {
		return errors.New("invalid rootfs: not an absolute path, or a symlink")
	}
	spec.Root.Path = real
	_, uts := findNamespace(spec, specs.UTSNamespace)
	_, mnt := findNamespace(spec, specs.MountNamespace)
	userPath, user := findNamespace(spec, specs.UserNamespace)
	timePath, timens := findNamespace(spec, specs.TimeNamespace)
	_, net := findNamespace(spec, specs.NetworkNamespace)
	l := spec.Linux
	switch {
	case spec.Hostname != "" && !uts:
		return errors.New("unable to set hostname without a private UTS namespace")
	case spec.Domainname != "" && !uts:
		return errors.New("unable to set domainname without a private UTS namespace")
	case len(l.MaskedPaths)+len(l.ReadonlyPaths) > 0 && !mnt:
		return errors.New("unable to restrict sys entries without a private MNT namespace")
	case user && userPath == "" && len(l.UIDMappings)+len(l.GIDMappings) == 0:
		return errors.New("user namespaces enabled, but no namespace path to join nor mappings to apply specified")
	case !user && len(l.UIDMappings)+len(l.GIDMappings) > 0:
		return errors.New("user namespace mappings specified, but user namespace isn't enabled in the config")
	case timens && timePath != "" && l.TimeOffsets != nil:
		return errors.New("time namespace enabled, but both namespace path and time offsets specified -- you may only provide one")
	case !timens && l.TimeOffsets != nil:
		return errors.New("time namespace offsets specified, but time namespace isn't enabled in the config")
	case len(l.NetDevices) > 0 && !net:
		return errors.New("unable to move network devices without a NET namespace")
	case l.IntelRdt != nil:
		return errors.New("intelRdt is specified in config, but this runtime has no Intel RDT")
	}
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if !filepath.IsAbs(m.Destination) {
			a.log.Warnf("mount %s: relative destination path is deprecated, using it as relative to /", m.Destination)
		}
		if in, ok := strings.CutPrefix(m.Destination, spec.Root.Path+"/"); ok {
			m.Destination = "/" + in // given from the host's point of view
		}
		// Relative sources are relative to the bundle.
		bind := m.Type == "bind" || slices.ContainsFunc(m.Options, func(o string) bool { return o == "bind" || o == "rbind" })
		if bind && m.Source != "" && !filepath.IsAbs(m.Source) {
			if m.Source, err = filepath.Abs(m.Source); err != nil {
				return err
			}
		}
	}
	return a.checkRootless(spec, user)
}

func (a *app) checkRootless(spec *specs.Spec, user bool) error {
	if os.Geteuid() == 0 {
		return nil
	}
	if !user {
		return errors.New("rootless container requires user namespaces")
	}
	if len(spec.Process.User.AdditionalGids) > 0 {
		return errors.New("cannot set any additional groups in a rootless container")
	}
	return nil
}
