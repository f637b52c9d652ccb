package image

import (
	"encoding/json"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/signal"
)

// change applies Dockerfile instructions to a config, those that commit and import
// allow; each string may hold several, a line each. What the config shares with
// others is not changed.
func change(c *dockerspec.DockerOCIImageConfig, changes []string) error {
	c.Env, c.Labels, c.Volumes, c.ExposedPorts = slices.Clone(c.Env), maps.Clone(c.Labels), maps.Clone(c.Volumes), maps.Clone(c.ExposedPorts)
	for _, lines := range changes {
		for line := range strings.SplitSeq(lines, "\n") {
			if line = strings.TrimSpace(line); line == "" {
				continue
			}
			word, rest, _ := strings.Cut(line, " ")
			if err := applyChange(c, strings.ToUpper(word), strings.TrimSpace(rest)); err != nil {
				return fault.New(fault.Invalid, "cannot apply change %q: %w", line, err)
			}
		}
	}
	return nil
}

func applyChange(c *dockerspec.DockerOCIImageConfig, word, rest string) error {
	if rest == "" && word != "CMD" && word != "ENTRYPOINT" {
		return fault.New(fault.Invalid, "%s requires an argument", word)
	}
	rest = ExpandFor(word, rest, c.Env)
	switch word {
	case "CMD":
		c.Cmd = execForm(rest, c.Shell)
	case "ENTRYPOINT":
		c.Entrypoint = execForm(rest, c.Shell)
	case "SHELL":
		if json.Unmarshal([]byte(rest), &c.Shell) != nil {
			return fault.New(fault.Invalid, "SHELL requires the arguments to be in JSON form")
		}
	case "ENV":
		kvs, err := keyValues(rest)
		if err != nil {
			return err
		}
		for _, kv := range kvs {
			c.Env = setEnv(c.Env, kv[0], kv[1])
		}
	case "LABEL":
		kvs, err := keyValues(rest)
		if err != nil {
			return err
		}
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		for _, kv := range kvs {
			c.Labels[kv[0]] = kv[1]
		}
	case "EXPOSE":
		return expose(c, rest)
	case "VOLUME":
		if c.Volumes == nil {
			c.Volumes = map[string]struct{}{}
		}
		var vols []string
		if json.Unmarshal([]byte(rest), &vols) != nil {
			vols = strings.Fields(rest)
		}
		for _, v := range vols {
			c.Volumes[v] = struct{}{}
		}
	case "USER":
		c.User = rest
	case "WORKDIR":
		if !path.IsAbs(rest) {
			rest = path.Join("/", c.WorkingDir, rest)
		}
		c.WorkingDir = path.Clean(rest)
	case "STOPSIGNAL":
		if _, err := signal.Parse(rest); err != nil {
			return err
		}
		c.StopSignal = rest
	case "ONBUILD":
		c.OnBuild = append(slices.Clone(c.OnBuild), rest)
	case "HEALTHCHECK":
		return applyHealth(c, rest)
	default:
		return fault.New(fault.Invalid, "%s is not a valid change command", word)
	}
	return nil
}

// expose reads ports and ranges: 80, 80/udp, 8000-8010/tcp.
func expose(c *dockerspec.DockerOCIImageConfig, rest string) error {
	if c.ExposedPorts == nil {
		c.ExposedPorts = map[string]struct{}{}
	}
	for f := range strings.FieldsSeq(rest) {
		r, err := network.ParsePortRange(f)
		if err != nil {
			return err
		}
		for n := int(r.Start()); n <= int(r.End()); n++ {
			c.ExposedPorts[strconv.Itoa(n)+"/"+string(r.Proto())] = struct{}{}
		}
	}
	return nil
}

func applyHealth(c *dockerspec.DockerOCIImageConfig, rest string) error {
	h := &dockerspec.HealthcheckConfig{}
	for strings.HasPrefix(rest, "--") {
		var flag string
		flag, rest, _ = strings.Cut(rest, " ")
		rest = strings.TrimSpace(rest)
		name, val, _ := strings.Cut(strings.TrimPrefix(flag, "--"), "=")
		if name == "retries" {
			n, err := strconv.Atoi(val)
			if err != nil || n < 0 {
				return fault.New(fault.Invalid, "--retries must be a number")
			}
			h.Retries = n
			continue
		}
		d, err := time.ParseDuration(val)
		if err != nil || d < 0 {
			return fault.New(fault.Invalid, "--%s %q is no duration", name, val)
		}
		switch name {
		case "interval":
			h.Interval = d
		case "timeout":
			h.Timeout = d
		case "start-period":
			h.StartPeriod = d
		case "start-interval":
			h.StartInterval = d
		default:
			return fault.New(fault.Invalid, "unknown flag --%s", name)
		}
	}
	word, arg, _ := strings.Cut(rest, " ")
	arg = strings.TrimSpace(arg)
	switch strings.ToUpper(word) {
	case "NONE":
		h.Test = []string{"NONE"}
	case "CMD":
		var argv []string
		switch {
		case json.Unmarshal([]byte(arg), &argv) == nil && len(argv) > 0:
			h.Test = append([]string{"CMD"}, argv...)
		case arg != "":
			h.Test = []string{"CMD-SHELL", arg}
		default:
			return fault.New(fault.Invalid, "HEALTHCHECK CMD lacks a command")
		}
	default:
		return fault.New(fault.Invalid, "unknown type %q: HEALTHCHECK takes CMD or NONE", word)
	}
	c.Healthcheck = h
	return nil
}

// execForm reads a JSON list, or wraps a line in the shell.
func execForm(rest string, shell []string) []string {
	var argv []string
	if strings.HasPrefix(rest, "[") && json.Unmarshal([]byte(rest), &argv) == nil {
		return argv
	}
	if rest == "" {
		return nil
	}
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(shell), rest)
}

func setEnv(env []string, k, v string) []string {
	for i, e := range env {
		if name, _, _ := strings.Cut(e, "="); name == k {
			env[i] = k + "=" + v
			return env
		}
	}
	return append(env, k+"="+v)
}

// keyValues reads `K=V K2="V 2"` or the old form `K V`.
func keyValues(s string) ([][2]string, error) {
	words, err := splitQuoted(s)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(words[0], "=") {
		k, v, ok := strings.Cut(s, " ")
		if !ok {
			return nil, fault.New(fault.Invalid, "%q must have two arguments", s)
		}
		return [][2]string{{k, strings.TrimSpace(v)}}, nil
	}
	var out [][2]string
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return nil, fault.New(fault.Invalid, "cannot find = in %q, it must be of the form name=value", w)
		}
		out = append(out, [2]string{k, v})
	}
	return out, nil
}

// splitQuoted splits at blanks outside quotes, which it removes.
func splitQuoted(s string) ([]string, error) {
	var out []string
	var b strings.Builder
	var quote byte
	in := false
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != '\'' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
			in = true
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote, in = c, true
		case quote == 0 && (c == ' ' || c == '\t'):
			if in {
				out = append(out, b.String())
				b.Reset()
				in = false
			}
		default:
			b.WriteByte(c)
			in = true
		}
	}
	if quote != 0 {
		return nil, fault.New(fault.Invalid, "a quote is not closed in %q", s)
	}
	if in {
		out = append(out, b.String())
	}
	if len(out) == 0 {
		return nil, fault.New(fault.Invalid, "%q is empty", s)
	}
	return out, nil
}
