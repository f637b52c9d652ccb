package model

import (
	"fmt"
	"slices"

	"github.com/compose-spec/compose-go/v2/types"
)

// Check refuses what cannot be done and warns of what has no effect here.
func Check(p *types.Project) (warnings []string, err error) {
	if err := p.CheckContainerNameUnicity(); err != nil {
		return nil, err
	}
	if len(p.Models) > 0 {
		return nil, fmt.Errorf("cannot run model %q: models need a model runner, which this engine has not; remove the section \"models\"", p.ModelNames()[0])
	}
	warn := func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
	for _, name := range p.ServiceNames() {
		s := p.Services[name]
		if s.Provider != nil {
			return nil, fmt.Errorf("cannot run service %q: it is provided by %q, and provider plugins are not supported; give it an image", name, s.Provider.Type)
		}
		if err := checkFiles(p, &s); err != nil {
			return nil, err
		}
		if len(s.PreStart) > 0 {
			warn("service %q: pre_start hooks are not supported and do not run", name)
		}
		if s.CredentialSpec != nil {
			warn("service %q: credential_spec is for Windows containers and has no effect", name)
		}
		if s.GetScale() > 1 && s.ContainerName != "" {
			return nil, fmt.Errorf("cannot run %d containers of service %q: all would have the name %q; remove container_name", s.GetScale(), name, s.ContainerName)
		}
		for _, key := range swarmKeys(s.Deploy) {
			warn("service %q: deploy.%s is for a swarm and has no effect here", name, key)
		}
	}
	for _, name := range p.NetworkNames() {
		if n := p.Networks[name]; n.Driver == "overlay" && !bool(n.External) {
			return nil, fmt.Errorf("cannot make network %q: the driver overlay needs a swarm, which this engine is not; use bridge or macvlan", name)
		}
	}
	return warnings, nil
}

// swarmKeys lists what of a deploy section only a swarm heeds.
func swarmKeys(d *types.DeployConfig) []string {
	if d == nil {
		return nil
	}
	var keys []string
	add := func(set bool, key string) {
		if set {
			keys = append(keys, key)
		}
	}
	add(d.Mode == "global" || d.Mode == "global-job" || d.Mode == "replicated-job", "mode "+d.Mode)
	add(d.UpdateConfig != nil, "update_config")
	add(d.RollbackConfig != nil, "rollback_config")
	add(len(d.Placement.Constraints) > 0 || len(d.Placement.Preferences) > 0 || d.Placement.MaxReplicas > 0, "placement")
	add(d.EndpointMode == "dnsrr" || d.EndpointMode == "vip", "endpoint_mode")
	if r := d.Resources.Reservations; r != nil {
		add(r.NanoCPUs > 0, "resources.reservations.cpus")
		add(len(r.GenericResources) > 0, "resources.reservations.generic_resources")
	}
	if r := d.RestartPolicy; r != nil {
		add(r.Delay != nil, "restart_policy.delay")
		add(r.Window != nil, "restart_policy.window")
	}
	return keys
}

// checkFiles looks at the secrets and configs of a service.
func checkFiles(p *types.Project, s *types.ServiceConfig) error {
	check := func(kind, source string, o types.FileObjectConfig, known bool) error {
		switch {
		case !known:
			return fmt.Errorf("service %q refers to undefined %s %q", s.Name, kind, source)
		case o.Driver != "" || o.TemplateDriver != "":
			return fmt.Errorf("cannot use %s %q: drivers for %ss are a swarm's; give a file, environment or content", kind, source, kind)
		}
		return nil
	}
	for _, r := range s.Secrets {
		o, ok := p.Secrets[r.Source]
		if err := check("secret", r.Source, types.FileObjectConfig(o), ok); err != nil {
			return err
		}
	}
	for _, r := range s.Configs {
		o, ok := p.Configs[r.Source]
		if err := check("config", r.Source, types.FileObjectConfig(o), ok); err != nil {
			return err
		}
	}
	return nil
}

// Dependents lists the services that depend on one with restart: true.
func Dependents(p *types.Project, service string) []string {
	var out []string
	for name, s := range p.Services {
		if d, ok := s.DependsOn[service]; ok && d.Restart {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}
