package adopt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
)

// Kinds that only engines of ours have.
const (
	Secrets Kind = "secret"
	Configs Kind = "config"
)

// carried names the images that hold what containers wrote, on their way.
const carried = "servin-carried/"

// DecideCarry compares two engines of ours: everything of one comes to the other, secrets too.
func DecideCarry(ctx context.Context, from, to *client.Client) ([]Step, error) {
	theirs, err := Read(ctx, from)
	if err != nil {
		return nil, fmt.Errorf("cannot read what is there: %w", err)
	}
	ours, err := Read(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("cannot read what the other side has: %w", err)
	}
	var secrets []Step
	used := map[string][]string{}
	for kind, k := range map[Kind]api.SecretKind{Secrets: api.KindSecret, Configs: api.KindConfig} {
		have := map[string]bool{}
		there, err := to.SecretList(ctx, k)
		if err != nil {
			return nil, err
		}
		for _, s := range there {
			have[s.Name] = true
		}
		list, err := from.SecretList(ctx, k)
		if err != nil {
			return nil, err
		}
		for _, s := range list {
			step := Step{Kind: kind, Name: s.Name, secret: s}
			if have[s.Name] {
				step.Skip = here
			}
			for _, c := range s.UsedBy {
				used[c] = append(used[c], s.Name)
			}
			secrets = append(secrets, step)
		}
	}
	var out []Step
	placed := false
	for _, s := range Decide(theirs, ours, Options{Archives: true}) {
		if s.Kind == Images && strings.HasPrefix(s.Name, carried) && !inUse(theirs, s.Name) {
			continue // of a switch that did not end
		}
		if s.Kind == Containers {
			if !placed {
				out, placed = append(out, secrets...), true
			}
			s.Warnings = nil
			labels := s.create.Config.Labels
			if n := used[s.Name]; len(n) > 0 && labels[api.LabelSecrets]+labels[api.LabelConfigs] == "" {
				s.Warnings = append(s.Warnings, "it had "+strings.Join(n, ", ")+" by --secret or --config: make it anew to give it that again")
			}
		}
		out = append(out, s)
	}
	if !placed {
		out = append(out, secrets...)
	}
	return out, nil
}

// inUse tells whether a container is made from the image.
func inUse(inv Inventory, name string) bool {
	return slices.ContainsFunc(inv.Containers, func(c container.InspectResponse) bool { return c.Config != nil && c.Config.Image == name })
}

// here is the reason of what is there already.
const here = "is here already"

// archive copies a volume through a checked archive. It is there whole or not at all.
func (a *Adopter) archive(ctx context.Context, name string) error {
	r, _, err := a.From.VolumeBackup(ctx, name, client.CopyVolumeOptions{Pause: true})
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = a.To.VolumeRestore(ctx, name, client.RestoreOptions{Devices: true}, &counter{r: r, tell: a.Progress})
	return err
}

var notInName = regexp.MustCompile(`[^a-z0-9]+`)

// layer brings what a container wrote as an image of it.
func (a *Adopter) layer(ctx context.Context, s *Step) (string, error) {
	repo, tag := carried+strings.Trim(notInName.ReplaceAllString(strings.ToLower(s.Name), "-"), "-"), s.id[:min(12, len(s.id))]
	if _, err := a.From.ContainerCommit(ctx, s.Name, client.CommitOptions{Repo: repo, Tag: tag, Comment: "what " + s.Name + " wrote"}); err != nil {
		return "", err
	}
	ref := repo + ":" + tag
	r, err := a.From.ImageSave(ctx, []string{ref}, nil)
	if err != nil {
		return "", err
	}
	defer r.Close()
	if err := a.To.ImageLoad(ctx, &counter{r: r, tell: a.Progress}, true, nil, func(client.Progress) error { return nil }); err != nil {
		return "", err
	}
	if _, err := a.From.ImageRemove(ctx, ref, client.ImageRemoveOptions{}); err != nil && a.Warn != nil {
		a.Warn("the image " + ref + " stays behind: " + err.Error())
	}
	return ref, nil
}

// secret brings a secret or config. A secret's value is read as a container reads it:
// no route tells it.
func (a *Adopter) secret(ctx context.Context, s *Step) error {
	k, data := s.secret.Kind, []byte(nil)
	if k == api.KindConfig {
		full, _, err := a.From.SecretInspect(ctx, k, s.Name)
		if err != nil {
			return err
		}
		data = full.Data
	} else {
		var err error
		if data, err = a.reveal(ctx, s.Name); err != nil {
			return fmt.Errorf("cannot read its value: %w", err)
		}
	}
	if len(data) != s.secret.Size {
		return fmt.Errorf("%d bytes came of %d", len(data), s.secret.Size)
	}
	_, err := a.To.SecretCreate(ctx, k, api.SecretSpec{Name: s.Name, Labels: s.secret.Labels, Data: data})
	return err
}

func (a *Adopter) reveal(ctx context.Context, name string) ([]byte, error) {
	r, err := a.From.Run(ctx, &api.RunRequest{
		Config:     &container.Config{Image: "servin/hello", Cmd: []string{"cat", "/run/secrets/value"}},
		HostConfig: &container.HostConfig{NetworkMode: "none", AutoRemove: true, LogConfig: container.LogConfig{Type: "none"}},
		Extra:      api.CreateExtra{Secrets: []api.SecretRef{{Kind: api.KindSecret, Name: name, Target: "value"}}},
		Stdout:     true, Stderr: true,
	})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var out, said bytes.Buffer
	exit, err := r.Copy(&out, &said)
	switch {
	case err != nil:
		return nil, err
	case exit == nil:
		return nil, errors.New("the connection broke off")
	case exit.ExitCode != 0:
		return nil, fmt.Errorf("reading it ended with %d", exit.ExitCode)
	}
	return out.Bytes(), nil
}
