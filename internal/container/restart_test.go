package container

import (
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
)

func TestDecideRestart(t *testing.T) {
	policy := func(n container.RestartPolicyMode, limit int) container.RestartPolicy {
		return container.RestartPolicy{Name: n, MaximumRetryCount: limit}
	}
	always, unless, fail, no := container.RestartPolicyAlways, container.RestartPolicyUnlessStopped, container.RestartPolicyOnFailure, container.RestartPolicyDisabled
	for name, c := range map[string]struct {
		in    Ended
		again bool
		delay time.Duration
	}{
		"no":                        {Ended{Policy: policy(no, 0), ExitCode: 1}, false, 0},
		"empty":                     {Ended{ExitCode: 1}, false, 0},
		"always success":            {Ended{Policy: policy(always, 0)}, true, RestartDelayMin},
		"always stopped":            {Ended{Policy: policy(always, 0), ManualStop: true}, false, 0},
		"always stopped, boot":      {Ended{Policy: policy(always, 0), ManualStop: true, AtBoot: true}, true, 0},
		"unless stopped":            {Ended{Policy: policy(unless, 0), ManualStop: true}, false, 0},
		"unless stopped, boot":      {Ended{Policy: policy(unless, 0), ManualStop: true, AtBoot: true}, false, 0},
		"unless, boot":              {Ended{Policy: policy(unless, 0), AtBoot: true}, true, 0},
		"on-failure success":        {Ended{Policy: policy(fail, 0)}, false, 0},
		"on-failure":                {Ended{Policy: policy(fail, 0), ExitCode: 3, Attempts: 99}, true, RestartDelayMin},
		"on-failure within limit":   {Ended{Policy: policy(fail, 2), ExitCode: 3, Attempts: 1, LastDelay: RestartDelayMin}, true, 2 * RestartDelayMin},
		"on-failure limit reached":  {Ended{Policy: policy(fail, 2), ExitCode: 3, Attempts: 2}, false, 0},
		"on-failure stopped, boot":  {Ended{Policy: policy(fail, 0), ExitCode: 3, ManualStop: true, AtBoot: true}, false, 0},
		"doubling":                  {Ended{Policy: policy(always, 0), LastDelay: 3 * time.Second}, true, 6 * time.Second},
		"bounded":                   {Ended{Policy: policy(always, 0), LastDelay: 50 * time.Second}, true, RestartDelayMax},
		"reset after a stable run":  {Ended{Policy: policy(always, 0), LastDelay: 50 * time.Second, RanFor: RestartStable}, true, RestartDelayMin},
		"no reset just before that": {Ended{Policy: policy(always, 0), LastDelay: time.Second, RanFor: RestartStable - 1}, true, 2 * time.Second},
	} {
		again, delay := DecideRestart(c.in)
		if again != c.again || delay != c.delay {
			t.Errorf("%s: got %v, %v; want %v, %v", name, again, delay, c.again, c.delay)
		}
	}
}
