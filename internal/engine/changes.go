package engine

import (
	"encoding/json"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/oci"
)

// applyChanges carries out the Dockerfile instructions that commit takes.
func applyChanges(c *mcontainer.Config, onBuild *[]string, changes []string) error {
	c.Env, c.Labels, c.Volumes, c.ExposedPorts = slices.Clone(c.Env), maps.Clone(c.Labels), maps.Clone(c.Volumes), maps.Clone(c.ExposedPorts)
	for _, line := range changes {
		for l := range strings.SplitSeq(line, "\n") {
			if l = strings.TrimSpace(l); l == "" {
				continue
			}
			if err := applyChange(c, onBuild, l); err != nil {
				return fault.New(fault.Invalid, "cannot apply change %q: %w", l, err)
			}
		}
	}
	return nil
}

func applyChange(c *mcontainer.Config, onBuild *[]string, line string) error {
	op, rest, _ := strings.Cut(line, " ")
	rest = strings.TrimSpace(rest)
	bad := fault.New(fault.Invalid, "it lacks an argument or has a wrong one")
	if rest == "" {
		return bad
	}
	rest = image.ExpandFor(strings.ToUpper(op), rest, c.Env)
	switch strings.ToUpper(op) {
	case "CMD":
		c.Cmd = command0(c, rest)
	case "ENTRYPOINT":
		c.Entrypoint = command0(c, rest)
	case "SHELL":
		if json.Unmarshal([]byte(rest), &c.Shell) != nil {
			return bad
		}
	case "ENV":
		kv, err := pairs(rest)
		if err != nil {
			return err
		}
		for _, p := range kv {
			setEnv(&c.Env, p[0]+"="+p[1])
		}
	case "LABEL":
		kv, err := pairs(rest)
		if err != nil {
			return err
		}
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		for _, p := range kv {
			c.Labels[p[0]] = p[1]
		}
	case "EXPOSE":
		if c.ExposedPorts == nil {
			c.ExposedPorts = network.PortSet{}
		}
		for f := range strings.FieldsSeq(rest) {
			pr, err := network.ParsePortRange(f)
			if err != nil {
				return err
			}
			for n := int(pr.Start()); n <= int(pr.End()); n++ {
				p, ok := network.PortFrom(uint16(n), pr.Proto())
				if !ok {
					return bad
				}
				c.ExposedPorts[p] = struct{}{}
			}
		}
	case "USER":
		c.User = rest
	case "WORKDIR":
		if !path.IsAbs(rest) {
			rest = path.Join("/", c.WorkingDir, rest)
		}
		c.WorkingDir = path.Clean(rest)
	case "STOPSIGNAL":
		if _, err := oci.ParseSignal(rest); err != nil {
			return err
		}
		c.StopSignal = rest
	case "VOLUME":
		if c.Volumes == nil {
			c.Volumes = map[string]struct{}{}
		}
		var l []string
		if json.Unmarshal([]byte(rest), &l) != nil {
			l = strings.Fields(rest)
		}
		for _, v := range l {
			c.Volumes[v] = struct{}{}
		}
	case "ONBUILD":
		*onBuild = append(*onBuild, rest)
	case "HEALTHCHECK":
		return applyHealth(c, rest)
	default:
		return fault.New(fault.Invalid, "%s is not a valid change command", op)
	}
	return nil
}

// command0 reads the exec form, or wraps the shell form.
func command0(c *mcontainer.Config, s string) []string {
	var l []string
	if json.Unmarshal([]byte(s), &l) == nil {
		return l
	}
	shell := c.Shell
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(shell), s)
}

// pairs reads "k=v k2='v 2'" or the old form "k v".
func pairs(s string) ([][2]string, error) {
	words, err := splitWords(s)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(words[0], "=") {
		k, v, ok := strings.Cut(s, " ")
		if !ok {
			return nil, fault.New(fault.Invalid, "%q has no value", k)
		}
		return [][2]string{{k, strings.TrimSpace(v)}}, nil
	}
	var out [][2]string
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return nil, fault.New(fault.Invalid, "%q is no key=value", w)
		}
		out = append(out, [2]string{k, v})
	}
	return out, nil
}

// splitWords splits at blanks outside quotes and takes the quotes away.
func splitWords(s string) ([]string, error) {
	var out []string
	var b strings.Builder
	var quote rune
	in, escaped := false, false
	for _, r := range s {
		switch {
		case escaped:
			b.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			escaped, in = true, true
		case quote != 0:
			if r == quote {
				quote = 0
			} else {
				b.WriteRune(r)
			}
		case r == '"' || r == '\'':
			quote, in = r, true
		case r == ' ' || r == '\t':
			if in {
				out = append(out, b.String())
				b.Reset()
				in = false
			}
		default:
			b.WriteRune(r)
			in = true
		}
	}
	if quote != 0 || escaped {
		return nil, fault.New(fault.Invalid, "a quote is not closed")
	}
	if in {
		out = append(out, b.String())
	}
	if len(out) == 0 {
		return nil, fault.New(fault.Invalid, "it lacks an argument")
	}
	return out, nil
}

func applyHealth(c *mcontainer.Config, s string) error {
	h := &mcontainer.HealthConfig{}
	for strings.HasPrefix(s, "--") {
		flag, rest, _ := strings.Cut(s, " ")
		k, v, _ := strings.Cut(strings.TrimPrefix(flag, "--"), "=")
		s = strings.TrimSpace(rest)
		if k == "retries" {
			n, err := strconv.Atoi(v)
			if err != nil || n < 0 {
				return fault.New(fault.Invalid, "retries %q is no number", v)
			}
			h.Retries = n
			continue
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			return fault.New(fault.Invalid, "%s %q is no duration", k, v)
		}
		switch k {
		case "interval":
			h.Interval = d
		case "timeout":
			h.Timeout = d
		case "start-period":
			h.StartPeriod = d
		case "start-interval":
			h.StartInterval = d
		default:
			return fault.New(fault.Invalid, "unknown flag %s", flag)
		}
	}
	op, rest, _ := strings.Cut(s, " ")
	rest = strings.TrimSpace(rest)
	switch strings.ToUpper(op) {
	case "NONE":
		h.Test = []string{"NONE"}
	case "CMD":
		var l []string
		if json.Unmarshal([]byte(rest), &l) == nil && len(l) > 0 {
			h.Test = append([]string{"CMD"}, l...)
		} else if rest != "" {
			h.Test = []string{"CMD-SHELL", rest}
		} else {
			return fault.New(fault.Invalid, "HEALTHCHECK CMD lacks a command")
		}
	default:
		return fault.New(fault.Invalid, "HEALTHCHECK takes CMD or NONE")
	}
	c.Healthcheck = h
	return nil
}
